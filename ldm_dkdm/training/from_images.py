"""Train a diffusion model on images (Alg. 2): teachers, and the baselines that distillation is compared with."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import named_first_stage
from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.load import read_card
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import (
    DiffusionDataConfig,
    DiffusionRun,
    LossConfig,
    ModelCard,
)
from ldm_dkdm.device import compiles, is_first_rank
from ldm_dkdm.distillation.batches import BatchStream, ReadAhead
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.image_data import EncodedStates, ImageSet, States, encode_sets, open_sets
from ldm_dkdm.distillation.make_student import (
    check_loss,
    load_initial,
    require_call,
    require_variance,
)
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.files import content_sha256, expanded
from ldm_dkdm.first_stage.codec import Codec, LatentCodec
from ldm_dkdm.images import grid, save_image
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.arguments import require_model, require_path
from ldm_dkdm.model.opening import refuse_in_pixel_space
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.networks.modes import compiled, make_trainable
from ldm_dkdm.reporting import Progress, decoration, logger
from ldm_dkdm.rng import forked_rng
from ldm_dkdm.training.calls import refuse_beside, run_of, training_of
from ldm_dkdm.training.export import exporting, on_save
from ldm_dkdm.training.finding import located_paths, require_same_classes, require_same_count
from ldm_dkdm.training.grids import SampleGrid
from ldm_dkdm.training.room import disk_needed, require_disk
from ldm_dkdm.training.run import Result, Run
from ldm_dkdm.training.saving import RunCheckpoint

STAGE = "first_stage_sha256"  # fact in a model's card
COUNTS = {"path": "real_images", "synthetic": "synthetic_images"}  # key of a set -> fact in a model's card


@torch.inference_mode(False)
def train(
    model: DiffusionModel,
    data: str | Path | Mapping[str, Any] | DiffusionDataConfig,
    out: str | Path,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    loss: str | Mapping[str, Any] | LossConfig = "eps",
    learning_rate: float = 1e-4,
    config: DiffusionRun | None = None,
    resume: bool = False,
    progress: bool | Progress = True,
    signals: Sequence[int] = (signal.SIGINT,),
    go_on: str | None = None,
    **options: Any,
) -> Result:
    """Train a model on images (Alg. 2); a second call continues where the first one stopped.

    Args:
        model: the model to train; on latents its first stage encodes the images. Where all its weights are frozen, all
            are trained; where some are, the others.
        data: folder of images (a sub-folder is a class), an ADM-style .npz, or the keys of `DiffusionDataConfig`.
        out: run folder.
        steps: optimizer steps. batch_size: images in a batch, per device.
        image_size: side of the images in pixels; default: what the model's states decode to.
        loss: one of LOSS_SPACES, or the keys of `LossConfig`.
        learning_rate, config, resume, progress, signals, go_on: as in `distill`.
        options: further keys of `DiffusionDataConfig`, `TrainerConfig` and `LoggingConfig`.

    Raises:
        UserError: images that do not fit the model, a bad value, or a folder that holds another run.
        Stopped: one of the signals; all is saved.
    """
    require_model(model, "model")
    require_path(out, "out")
    numbers = {"steps": steps, "batch_size": batch_size, "image_size": image_size, **options}
    refuse_beside(config, numbers)
    if config is None:
        config = training_of(model, data, expanded(out), loss, {"learning_rate": learning_rate, **numbers})
    run = run_of(DiffusionRun, config, out, resume, progress, signals, go_on)
    return _train_in(run, model)


def new_model(config: DiffusionRun, run: Path | None = None) -> DiffusionModel:
    """The model that a configuration describes, with its initial weights.

    Args:
        config: a relative path of its first stage is looked for around the run folder first.
        run: the run folder, if there is one.

    Raises:
        UserError: an unknown target, a bad parameter, initial weights that do not fit, or a first stage in pixel space.
    """
    if run is None or not (run / "config.yaml").is_file():  # runs that older versions began ignore it
        refuse_in_pixel_space(config.first_stage, config.diffusion)
    with forked_rng(config.trainer.seed):
        network = build(config.model, NETWORKS, "model.params")
    load_initial(network, config.model, "model.init")
    return DiffusionModel(
        network,
        schedule=schedule_of(config.diffusion),
        space=config.diffusion.space,
        parameterization=config.model.parameterization,
        first_stage=named_first_stage(located_paths(config.first_stage, run)),
        node=config.model.plain,
    )


def _train_in(run: Run, model: DiffusionModel) -> Result:
    """Train a model in a run folder; errors as `train`."""
    config: DiffusionRun = replace(
        run.config, data=located_paths(run.config.data, run.folder.path if run.resumed else None)
    )
    if run.trainer.compile == "graphs":
        raise UserError("compile: graphs are for a distillation, and this run trains on images; use true")
    require_trainable(model, config, run.resumed)
    codec = model.codec().to(run.device, run.precision)
    _require_same_channels(codec)
    trained = model.changed(precision=run.precision)
    by_key = open_sets(config.data, run.trainer.seed, codec.channels)
    require_fitting_labels(model, config.data, by_key)
    sets = list(by_key.values())
    found = tuple(codec.encode(sets[0].take(torch.zeros(1, dtype=torch.long, device="cpu"))).shape[1:])
    if found != model.shape:
        raise UserError(f"model.params: states of {model.shape}, but the images make {found}")
    stage = _first_stage_facts(codec, model, run)
    counted = _counted_images(by_key, config.data, run)
    own = {
        name: fact for name, fact in model.info.items() if name not in COUNTS.values()
    }  # without an earlier training's counts
    info = {**own, **stage, **counted, **_named_classes(model, config.data, sets[0], run)}
    export = exporting(model.changed(info=info), run.folder, config.logging.export_dtype)
    if end := run.end(model.network):
        return run.ended(model, end, export)
    make_trainable(model.network, "model")
    require_disk(run.folder, disk_needed(model.parameters, config.trainer, config.logging))
    states = _states(config, sets, model, run.progress)
    model.network.train()

    def stream_for(trainer: L.Trainer) -> BatchStream:
        stream = DataStream(
            states,
            model.schedule,
            config.data.batch_size,
            run.trainer.max_steps * run.trainer.accumulate,
            run.trainer.seed,
            trainer.global_rank,
            trainer.strategy.root_device,
            run.first_batch,
            config.data.t_cap,
        )
        return stream if config.data.cache else ReadAhead(stream, run.trainer.accumulate, run.stop.on_fault)

    samples = run.folder.path / "samples"
    saving = RunCheckpoint(run.folder.checkpoints, config.logging, on_save(export))
    with run.open(), compiled([trained.network], compiles(run.trainer.compile, run.device)):
        if is_first_rank():
            count = min(config.logging.sample_count, len(sets[0]))
            shown = sets[0].take(torch.arange(count, device="cpu"))
            with decoration(str(samples / "data.png")):
                save_image(grid(shown), samples / "data.png")
        grids = SampleGrid(samples, config.logging, run.trainer.seed)
        result = run.fit(StudentModule(trained, config.loss, run.trainer), stream_for, [saving, grids])
    return run.result(model, result)


def _first_stage_facts(codec: Codec, model: DiffusionModel, run: Run) -> dict[str, str]:
    """SHA-256 of what makes the latents, for the model's card; in pixel space nothing does.

    Raises:
        UserError: the run began with another first stage; runs of older versions do not say theirs.
    """
    if not isinstance(codec, LatentCodec):
        return {}
    now = content_sha256(codec.autoencoder.state_dict(), {"scale_factor": str(codec.scale_factor)})
    card = run.folder.model / "config.yaml"
    before = read_card(card, ModelCard).info.get(STAGE) if run.latest and card.is_file() else None
    if before not in (None, now):
        path = model.first_stage.path if model.first_stage else "none"
        raise UserError(
            f"first_stage: {path} is not the one that {run.folder.path} began with: the SHA-256 of its weights and "
            f"scale was {before} and is {now}; put the old one back, or start a new run (logging.name=NEW, in Python "
            "out)"
        )
    return {STAGE: now}


def _counted_images(sets: Mapping[str, ImageSet], data: DiffusionDataConfig, run: Run) -> dict[str, int]:
    """How many images the run uses, for the model's card.

    Raises:
        UserError: the run began with another number; runs of older versions do not say theirs.
    """
    counts = {COUNTS[key]: len(images) for key, images in sets.items()}
    for key, fact in COUNTS.items():
        if key in sets and run.latest:
            with naming(f"data.{key}"):
                require_same_count(run.folder, fact, counts[fact], getattr(data, key))
    return counts


def require_trainable(model: DiffusionModel, config: DiffusionRun, resumed: bool = False) -> None:
    """Refuse what images cannot train: outside pixel space L_vlb's likelihood of 8-bit values has no meaning.

    A resumed run may have keys of a variance that its network lacks: older versions ignored them.

    Raises:
        UserError: the key that does not fit.
    """
    check_loss(config.loss, model.schedule)
    if not require_call(model) and not resumed:
        require_variance(config.loss)
    steps_within(config.logging, "sample_steps", model.schedule.num_timesteps)
    network = model.network
    inputs, outputs = model.shape[0], getattr(network, "out_channels", model.shape[0])
    if outputs not in (inputs, 2 * inputs):
        raise UserError(f"model.params.out_channels: {outputs} must be {inputs} or {2 * inputs}")
    if outputs != inputs and not model.space.likelihood:
        advice = " (learn_sigma: false)" if hasattr(network, "null_label") else ""
        raise UserError(f"model.params.out_channels: {outputs} must be {inputs} in latent space{advice}")


def _require_same_channels(codec: Codec) -> None:
    """Refuse a first stage that cannot encode what it decodes."""
    if isinstance(codec, LatentCodec) and codec.autoencoder.in_channels != codec.channels:
        raise UserError(
            f"first_stage: it encodes images of {codec.autoencoder.in_channels} channels and decodes {codec.channels}; "
            "training needs one that decodes what it encodes"
        )


def require_fitting_labels(model: DiffusionModel, data: DiffusionDataConfig, sets: Mapping[str, ImageSet]) -> None:
    """Refuse sets without labels, or with labels out of range, for a class-conditional model.

    Raises:
        UserError: the key of the set that does not fit.
    """
    if data.classes and len(data.classes) != model.num_classes:
        have = "no classes" if model.num_classes is None else f"{model.num_classes} classes"
        raise UserError(f"data.classes: {len(data.classes)} names, but the model has {have}")
    if model.num_classes is None:
        return
    for key, images in sets.items():
        if images.unclear:
            raise UserError(f"data.{key}: {images.unclear}")
        if images.labels is None:
            loose = f"; {images.loose} is in none" if images.loose else ""
            raise UserError(
                f"data.{key}: a class-conditional model needs labels: arr_1 of an .npz, or a sub-folder for every class"
                + loose
            )
        if images.classes and is_first_rank():
            rest = ", ..." if len(images.classes) > 20 else ""
            logger.info(f"data.{key}: {len(images.classes)} classes: {', '.join(images.classes[:20])}{rest}")
        if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < model.num_classes:
            raise UserError(
                f"model.params.num_classes: {model.num_classes}, but data.{key}'s labels go from "
                f"{int(images.labels.min())} to {int(images.labels.max())}"
            )


def _named_classes(
    model: DiffusionModel, data: DiffusionDataConfig, images: ImageSet, run: Run
) -> dict[str, list[str]]:
    """What the labels mean, for the model's card: as the configuration says, else as the folders are named."""
    if model.num_classes is None:
        return {}
    given = [name if name == str(label) else f"{label} {name}" for label, name in enumerate(data.classes)]
    names = given or list(images.classes)
    if run.latest and names:
        require_same_classes(run.folder, names)
    return {"classes": names} if names else {}


def _states(config: DiffusionRun, sets: Sequence[ImageSet], model: DiffusionModel, progress: bool | Progress) -> States:
    labeled = model.num_classes is not None
    if config.data.cache and model.space.encoded:
        return encode_sets(sets, model.codec(), config.data.flip, labeled, progress)
    if config.data.cache:  # pixels need no encoding, but files need reading
        sets = [images.loaded(progress) for images in sets]
    return EncodedStates(sets, model.codec(), config.data.flip, labeled)
