"""The samples of a model as a set of images: drawn when they are needed, none kept."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm import __version__
from ldm_dkdm.checkpoints.as_built import is_as_built
from ldm_dkdm.checkpoints.averaging import KIND, UNSAID
from ldm_dkdm.checkpoints.card import FILE_SHA256, sha256
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.comparability import size_fact
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.sampling import require_sampling, settle, steps_of

PROBED, PROBED_AT_ONCE = 64, 8  # states, timesteps and labels at which a user's network is told from others


@dataclass
class Clock:
    """Images that were drawn, and the seconds that their sampling and decoding took."""

    images: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Images a second; 0 where none were drawn."""
        return self.images / self.seconds if self.images else 0.0

    def timed(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same batches, with the time that each takes."""
        while True:
            started = time.perf_counter()
            images = next(batches, None)
            if images is None:
                return
            self.seconds += time.perf_counter() - started
            self.images += len(images)
            yield images


@dataclass(frozen=True)
class ModelImages:
    """Samples of a model; image i depends on seed + i only. The clock, if there is one, times their drawing."""

    model: DiffusionModel
    config: SamplingConfig
    name: str
    clock: Clock | None = field(default=None, compare=False, repr=False)

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.config.count

    @cached_property
    def weights(self) -> str:
        """Hash of the network's tensors in memory."""
        return weights_of(self.model.network)

    @cached_property
    def first_stage(self) -> str | None:
        """Hash of the first stage's tensors in memory; None in pixel space."""
        codec = self.model.codec()
        return weights_of(codec.autoencoder) if isinstance(codec, LatentCodec) else None

    def identity(self) -> dict[str, Any]:
        """Weights, process, sampling, of a user's network predictions too, since its code may be other code tomorrow.

        A doubtful scale of the latents is settled first, by the images 0 and 1.
        """
        return self._identity

    @cached_property
    def _identity(self) -> dict[str, Any]:
        model = self.model
        settle(model, self.config)
        return {
            "weights": self.weights,
            "first_stage": self.first_stage,
            "diffusion": repr(model.diffusion),
            "node": repr(model.node),
            "guidance": [model.guidance, model.null_label],
            "scale_factor": model.codec().scale_factor,
            **({} if is_as_built(model.network, model.node) else {"predictions": predictions_of(model)}),
            **self.sampling(),
        }

    def sampling(self) -> dict[str, Any]:
        """What decides the samples of a given model."""
        config = self.config
        return {
            "images": config.count,
            "seeds": f"{config.seed} ... {config.seed + config.count - 1}",
            "sampler": config.sampler,
            "steps": steps_of(self.model, config),
            "eta": config.eta,
            "labels": list(config.labels) or None,
            "arithmetic": self.model.precision,
        }

    def facts(self) -> dict[str, Any]:
        """Provenance: the sampling, the weights in memory, and the hash of the file that they were opened from."""
        return {**self.model_facts(), **self.sampling()}

    def model_facts(self) -> dict[str, Any]:
        """The same without the sampling: for metrics that draw no images."""
        file = self.model.file
        opened = file is not None and file.exists()
        return {
            "source": self.name,
            "kind": "model",
            "arithmetic": self.model.precision,
            "guidance": self.model.guidance,
            "parameters": self.model.parameters,
            "weights": self.model.info.get(KIND, UNSAID) if opened else None,
            "opened_from": str(file) if opened else None,
            "sha256": self.weights,
            "first_stage_sha256": self.first_stage,
            "opened_from_sha256": sha256(file) if file is not None and opened else None,
            "size": size_fact(*(side * self.model.codec().downsampling for side in self.model.shape[1:])),
            "rounding": self.model.codec().rounding,
        }

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Samples from number `first` on."""
        labels = list(self.config.labels)
        turn = first % len(labels) if labels else 0
        config = replace(
            self.config,
            count=self.config.count - first,
            seed=self.config.seed + first,
            batch_size=batch_size,
            labels=labels[turn:] + labels[:turn],
        )
        images = (batch.images for batch in self.model.sample_batches(config))
        return images if self.clock is None else self.clock.timed(images)

    def stored(self) -> None:
        """None: a model has no statistics."""


def sampled(model: DiffusionModel, config: SamplingConfig, name: str | None = None) -> ModelImages:
    """Samples of a model, checked to fit it.

    Raises:
        UserError: as `DiffusionModel.sample`.
    """
    require_sampling(model, config)
    return ModelImages(model, config, name or str(model.path or "model"))


def compared(student: DiffusionModel, teacher: DiffusionModel, images: int) -> dict[str, Any]:
    """Provenance of the figures of `evaluate`: both models' weights in memory, precision, the images' sampler."""
    file = student.file
    return {
        FILE_SHA256: sha256(file) if file is not None and file.exists() else None,
        **{f"{name}_sha256": weights_of(model.network) for name, model in (("student", student), ("teacher", teacher))},
        "sampler": "ddim" if images else None,
        "precision": student.precision,
        "ldm_dkdm": __version__,
    }


def weights_of(*modules: nn.Module) -> str:
    """A hash of the tensors of networks."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def predictions_of(model: DiffusionModel) -> str:
    """A hash of a model's predictions at fixed states, timesteps from 0 to T-1 and labels, all evenly spread.

    It follows the code of a network, its plain attributes, buffers and hooks, of which weights say nothing.
    """
    generator, digest = torch.Generator("cpu").manual_seed(0), hashlib.sha256()
    x = torch.randn((PROBED, *model.shape), generator=generator, device="cpu")
    t = torch.linspace(0, model.schedule.num_timesteps - 1, PROBED, device="cpu").long()
    label = None
    if model.classes is not None:
        labels = torch.tensor(model.classes or [model.null_label], device="cpu")
        label = labels[torch.linspace(0, len(labels) - 1, PROBED, device="cpu").long()]
    for start in range(0, PROBED, PROBED_AT_ONCE):
        own, device = slice(start, start + PROBED_AT_ONCE), model.device
        found = model.predict(x[own].to(device), t[own].to(device), None if label is None else label[own].to(device))
        for tensor in (found.eps, found.x_0):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
