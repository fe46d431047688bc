"""Estimate the cost of a training on images before it starts."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldm_dkdm.config.schema import DiffusionRun
from ldm_dkdm.device import default_device
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.image_data import CachedStates, ImageSet, open_sets
from ldm_dkdm.files import exists
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import duration, pace, size
from ldm_dkdm.training.from_images import require_fitting_labels, require_trainable
from ldm_dkdm.training.plan import codec_parameters, early, network_cost
from ldm_dkdm.training.room import disk_needed
from ldm_dkdm.training.saving import KEPT
from ldm_dkdm.training.several import on_each, sharded_memory, traffic, training_bytes, without_traffic
from ldm_dkdm.training.timing import TIMED_ITERATIONS, Times, time_iterations, timed_batch, timed_with

ENCODED = 4  # images whose encoding is timed


@dataclass(frozen=True)
class ImageTraining:
    """Model, configuration and images of one run.

    Attributes:
        missing: the files and folders of images that do not exist; then there are no `sets`.
        sets: the images that the run uses.
    """

    model: DiffusionModel
    config: DiffusionRun
    missing: Sequence[str]
    sets: Sequence[ImageSet]

    @property
    def images(self) -> int:
        """Images that the run uses, without mirrored copies."""
        return sum(map(len, self.sets))

    @property
    def batches(self) -> int:
        """Batches of the whole run on one device."""
        return self.config.trainer.max_steps * self.config.trainer.accumulate

    @property
    def encodes_once(self) -> bool:
        """Whether all images are encoded before the training, mirrored ones too."""
        return self.config.data.cache and self.model.space.encoded

    @property
    def encodings(self) -> int:
        """Images that the first stage encodes before the training."""
        return self.images * (1 + self.config.data.flip) if self.encodes_once else 0


def plan_training(model: DiffusionModel, config: DiffusionRun, resumed: bool = False) -> ImageTraining:
    """Check that model, configuration and images fit together; nothing is written.

    A resumed run may have keys that a new one may not (`require_trainable`).

    Raises:
        UserError: the first thing that does not fit; images that do not exist are not an error.
    """
    require_trainable(model, config, resumed)
    paths = [path for path in (config.data.path, config.data.synthetic) if path]
    missing = [path for path in paths if not exists(path)]
    readable = paths and not missing and (not model.space.encoded or _has_codec(model))
    sets = open_sets(config.data, config.trainer.seed, model.codec().channels) if readable or not paths else {}
    if sets:
        require_fitting_labels(model, config.data, sets)
    return ImageTraining(model, config, missing, list(sets.values()))


def training_costs(parts: ImageTraining) -> dict[str, str]:
    """The lines of a plan that need no timing, in order: quantity -> amount."""
    config, model = parts.config, parts.model
    batch, trainer = config.data.batch_size, config.trainer
    each, device = on_each(trainer), default_device(trainer.accelerator)
    resident = training_bytes(model.parameters, trainer, device) + 4 * codec_parameters(
        model
    )  # the first stage in float32
    precision = {"bf16": "bf16 autocast", "32": "float32"}[model.precision]
    held = (size(_cached_bytes(parts)) if parts.sets else "not known") + f" for the images{each}"
    epochs = f", {parts.batches * batch * trainer.ranks / parts.images:.1f} epochs" if parts.images else ""
    return {
        "model": network_cost(model),
        "images": _images(parts),
        "images, training": f"{parts.batches * batch:,} ({parts.batches:,} iterations of {batch}){each}{epochs}",
        "memory, device": f"{size(resident)} on {device.type} and the activations of one batch ({precision})",
        "memory, host": "; ".join([held, *sharded_memory(model.parameters, trainer, device)]),
        **traffic(model.parameters, trainer),
        "disk": f"{size(disk_needed(model.parameters, config.trainer, config.logging))} for the model, {KEPT} "
        "checkpoints and the next one while it is written",
    }


def _images(parts: ImageTraining) -> str:
    if parts.missing:
        return f"{', '.join(parts.missing)}: missing; planned without the images"
    if not parts.sets:
        return "not counted: the first stage is missing"
    mirrored = ", each also mirrored" if parts.config.data.flip else ""
    encoded = f"; {parts.encodings:,} encodings before the training" if parts.encodes_once else ""
    return f"{parts.images:,}{mirrored}{encoded}"


def _cached_bytes(parts: ImageTraining) -> int:
    """Bytes of host memory: float32 states, or uint8 images, of which .npz files are always in memory."""
    if parts.encodes_once:
        return 4 * math.prod(parts.model.shape) * parts.encodings
    held = [s for s in parts.sets if parts.config.data.cache or isinstance(s.images, torch.Tensor)]
    return sum(len(images) * images.size**2 * images.channels for images in held)


def training_time(parts: ImageTraining) -> dict[str, str]:
    """The lines of a plan about time, from a few timed iterations."""
    config, batch = parts.config, parts.config.data.batch_size
    trial = _time(parts, 1, 1).iteration(1)  # also warms the machine up
    timed = timed_batch(batch, trial)
    encoding = _encoding_seconds(parts.model) if parts.model.space.encoded and _has_codec(parts.model) else 0.0
    seconds = _time(parts, timed, TIMED_ITERATIONS).iteration(batch / timed)
    seconds += 0.0 if parts.encodes_once else encoding * batch
    training, limit = parts.batches * seconds, 60 * (config.trainer.max_minutes or math.inf)
    before = f", {duration(parts.encodings * encoding)} of encoding" if parts.encodings else ""
    if parts.model.space.encoded and not (encoding and parts.images):
        before = ", and the encoding"
    eta = min(training, limit) + parts.encodings * encoding
    needed = f"about {duration(eta)}{on_each(config.trainer)}: {pace(seconds)} an iteration{before} {timed_with(timed)}"
    needed += without_traffic(config.trainer)
    return {"time": needed, **early(config.trainer, training)}


def _time(parts: ImageTraining, batch: int, iterations: int) -> Times:
    """Times of iterations on random states."""
    model, config = parts.model, parts.config
    device = default_device(config.trainer.accelerator)
    labels = None if model.num_classes is None else torch.zeros(batch, dtype=torch.long, device="cpu")
    states = CachedStates(torch.randn(batch, *model.shape, dtype=torch.float32, device="cpu"), labels)
    stream = DataStream(states, model.schedule, batch, iterations, device=device, t_cap=config.data.t_cap)
    return time_iterations(model, config.loss, stream.next_batch, device, iterations)


def _encoding_seconds(model: DiffusionModel) -> float:
    """Seconds in which the first stage encodes one image."""
    codec, side = model.codec(), model.shape[-1] * model.codec().downsampling
    images = torch.zeros(ENCODED, side, side, codec.channels, dtype=torch.uint8, device="cpu")
    codec.encode(images[:1])
    started = time.perf_counter()
    codec.encode(images).cpu()  # the copy waits for the device
    return (time.perf_counter() - started) / ENCODED


def _has_codec(model: DiffusionModel) -> bool:
    """Whether the first stage's file is there, or none is needed."""
    return model.first_stage is None or model.first_stage.path.exists()
