"""Train a first stage on images."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.checkpoints.model_folder import write_folder
from ldm_dkdm.checkpoints.reading import read_named_weights
from ldm_dkdm.config.checked import Section
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import (
    CodebookConfig,
    FirstStageCard,
    FirstStageLoss,
    FirstStageRun,
    LoggingConfig,
    TrainerConfig,
)
from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.evaluation.perceptual import lpips_loss
from ldm_dkdm.first_stage import FIRST_STAGES, VQModel
from ldm_dkdm.first_stage.vqgan import RESTARTING, FirstStageModule, held_out_psnr, latent_scale, latents_of_a_batch
from ldm_dkdm.images import load_images
from ldm_dkdm.model.arguments import require_path
from ldm_dkdm.reporting import Progress, decoration, logger
from ldm_dkdm.rng import forked_rng
from ldm_dkdm.training.calls import run_of
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.finding import located_paths, require_same_count
from ldm_dkdm.training.room import disk_needed, require_disk
from ldm_dkdm.training.run import Result, Run
from ldm_dkdm.training.run_folder import RunFolder
from ldm_dkdm.training.saving import RunCheckpoint

VQ_MODELS = {name: kind for name, kind in FIRST_STAGES.items() if kind is VQModel}


class _ImageStream(IterableDataset[Tensor]):
    """Image batches uint8 (B,H,W,C), the same after a resume."""

    def __init__(self, images: Tensor, batch_size: int, max_steps: int, seed: int, first_step: int) -> None:
        self.arguments = (images, batch_size, seed, first_step)
        self.max_steps = max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[Tensor]:
        return _endless_batches(*self.arguments)


@torch.inference_mode(False)
def train_first_stage(
    config: FirstStageRun,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool | Progress = True,
    signals: Sequence[int] = (signal.SIGINT,),
    go_on: str | None = None,
) -> Result:
    """Train a first stage to `trainer.max_steps`; a second call continues where the first one stopped.

    Args:
        config: the run's, for example `load_config(FILE, schema=FirstStageRun)`.
        out: run folder.
        resume, progress, signals, go_on: as in `distill`.

    Returns:
        The `VQModel` with its EMA weights, the run folder, the steps taken and what ended the run.

    Raises:
        UserError: a bad value, images that do not fit, or a folder that holds another run.
        Stopped: one of the signals; all is saved.
    """
    require_path(out, "out")
    return _train_first_stage_in(run_of(FirstStageRun, config, out, resume, progress, signals, go_on))


def _train_first_stage_in(run: Run) -> Result:
    """Train a first stage in a run folder; errors as `train_first_stage`."""
    config: FirstStageRun = run.config
    place = run.folder.path if run.resumed else None
    data, loss = located_paths(config.data, place), located_paths(config.loss, place)
    with forked_rng(config.trainer.seed):
        vq = build(config.first_stage, VQ_MODELS, "first_stage.params")
        assert isinstance(vq, VQModel)
        _refuse_unused(config, run.resumed)
        _require_channels(vq, config)
        _require_side(vq, config)
        module = FirstStageModule(vq, config, lpips_loss(loss.perceptual_backbone) if loss.perceptual else None)
    if end := run.end():
        logger.info(f"{run.folder.path}: {end}")
        weights = run.folder.model / WEIGHTS
        load_strictly(vq.eval(), read_named_weights(run.folder.model, WEIGHTS), weights)
        return Result(vq, run.folder.path, run.step, end)
    trained = sum(parameter.numel() for parameter in module.parameters())
    _require_latents(vq, config, run.step)
    require_disk(run.folder, disk_needed(trained, config.trainer, config.logging))
    size, held_out = config.data.image_size, None  # which is read first, since it is the smaller set
    if data.held_out:
        with naming("data.held_out"):
            held_out = load_images(data.held_out, size, vq.in_channels, run.progress)
    with naming("data.path"):
        images = load_images(data.path, size, vq.in_channels, run.progress)
        if run.latest:
            require_same_count(run.folder, COUNT, len(images), data.path)
    if config.data.batch_size > len(images):
        raise UserError(f"data.batch_size: {config.data.batch_size} is more than the {len(images)} images")

    def stream_for(trainer: L.Trainer) -> _ImageStream:
        seed, steps = config.trainer.seed + trainer.global_rank, config.trainer.max_steps
        return _ImageStream(images, config.data.batch_size, steps, seed, run.first_batch)

    export = _export_on_save(config, run.folder, images, held_out)
    for line in _idle(config):
        logger.warning(line)
    with run.open():
        result = run.fit(module, stream_for, [RunCheckpoint(run.folder.checkpoints, config.logging, export)])
    return replace(result, model=vq.eval())


def _endless_batches(data: Tensor, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Shuffled batches without end. Epoch e's order follows from (seed, e), so a resumed run that
    passes its `first_step` sees the batches that it would have seen.
    """
    per_epoch = len(data) // batch_size
    epoch, offset = divmod(first_step, per_epoch)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(data))
        for i in range(offset, per_epoch):
            yield data[torch.from_numpy(order[i * batch_size : (i + 1) * batch_size])]
        epoch, offset = epoch + 1, 0


def _require_channels(vq: VQModel, config: FirstStageRun) -> None:
    """Refuse channels of the images that a term of the loss or the augmentation cannot take."""
    channels, where = vq.in_channels, "first_stage.params.ddconfig"
    if vq.out_channels != channels:
        raise UserError(f"{where}.out_ch: {vq.out_channels} must be in_channels, {channels}")
    if config.hue and channels != 3:
        raise UserError(f"hue: images of {channels} channels have none; set it to 0")
    if config.loss.perceptual and channels not in (1, 3):
        raise UserError(f"loss.perceptual: LPIPS takes grey or RGB images, not {channels} channels; set it to 0")


SMALLEST = {"adversarial": 12, "perceptual": 16}  # term of the loss -> side below which its network has no output


def _require_side(vq: VQModel, config: FirstStageRun) -> None:
    """Refuse a side of the images that the autoencoder does not give back, or that a term of the loss cannot take."""
    side, factor = config.data.image_size, vq.downsampling
    if side % factor:
        raise UserError(
            f"data.image_size: {side} is not a multiple of {factor}, by which first_stage.params.ddconfig.ch_mult "
            f"shrinks images; take {side + -side % factor}"
        )
    for term, smallest in SMALLEST.items():
        if getattr(config.loss, term) and side < smallest:
            raise UserError(f"data.image_size: {side} is too small for loss.{term}, which takes {smallest} or more")


def _require_latents(vq: VQModel, config: FirstStageRun, step: int) -> None:
    """Refuse a codebook that is larger than what it starts from, the latents before the quantisation begins."""
    codes, each, steps = vq.quantize.n_e, latents_of_a_batch(vq, config), config.codebook.continuous_steps
    if step < steps and steps * each < codes:
        raise UserError(
            f"first_stage.params.n_embed: {codes} entries start as centres of latents, and the "
            f"codebook.continuous_steps, {steps}, have {steps * each}; set those to {-(-codes // each)} or more"
        )


def _idle(config: FirstStageRun) -> Iterator[str]:
    """Lines about what does not begin within the steps of the training."""
    steps, begins = config.trainer.max_steps, config.codebook.continuous_steps
    if begins >= steps:
        yield (
            f"codebook.continuous_steps: the first {begins} steps do not quantise, and the training ends after {steps} "
            "(trainer.max_steps): its codebook is not trained"
        )
    if config.loss.adversarial and config.loss.adversarial_start >= steps:
        yield f"loss.adversarial_start: {config.loss.adversarial_start} is not within the {steps} steps; has no effect"
    every = config.codebook.restart_every
    if every != CodebookConfig().restart_every and -(-begins // every) * every > RESTARTING * steps:
        last = int(RESTARTING * steps)
        yield (
            f"codebook.restart_every: {every} has no effect: codes restart at multiples of it from step {begins} (the "
            f"codebook's first) to {last} ({RESTARTING:.0%} of the steps)"
        )


COUNT = "images"  # fact in the folder's config: how many images trained the first stage
WEIGHTS = "model.safetensors"  # file name of the weights in a first stage's folder
OWN_CHOICES = (
    "lr_schedule",
    "lr_warmup",
    "weight_decay",
    "grad_clip",
    "compile",
    "devices",
    "num_nodes",
    "strategy",
    "timeout",
    "accumulate",
    "early_stop",
    "max_minutes",
)  # trainer keys that this training sets itself


NO_GRIDS = ("sample_every", "sample_count", "sample_steps")  # logging keys of grids, which this training does not draw


def _refuse_unused(config: FirstStageRun, resumed: bool) -> None:
    """Refuse keys of the shared sections that this training sets itself, and those of what it does not do.

    A resumed run may have the latter: older versions ignored them, and its loss cannot change.
    """
    own = TrainerConfig(max_steps=1, learning_rate=1.0)
    why = "the first stage trains on one device with its own schedule"
    _require_defaults("trainer", config.trainer, own, OWN_CHOICES, why)
    if not resumed:
        grids = "a first stage draws no grids of samples"
        _require_defaults("logging", config.logging, LoggingConfig(), NO_GRIDS, grids)
        for term, keys in (("perceptual", ("perceptual_backbone",)), ("adversarial", ("adversarial_start",))):
            if not getattr(config.loss, term):
                _require_defaults("loss", config.loss, FirstStageLoss(), keys, f"has no effect without loss.{term}")
    if config.trainer.ranks > 1:
        raise UserError(
            f"trainer.devices: the first stage trains on one device, and {config.trainer.ranks} are started"
        )
    for key in ("ckpt", "scale_factor"):
        if getattr(config.first_stage, key) is not None:
            raise UserError(f"first_stage.{key}: the training makes it; remove the key")


def _require_defaults(name: str, section: Section, defaults: Section, keys: Sequence[str], why: str) -> None:
    for key in keys:
        default = getattr(defaults, key)
        if getattr(section, key) != default:
            shown = "null" if default is None else default
            raise UserError(f"{name}.{key}: {why}; remove the key, or set it to {shown}")


def _export_on_save(
    config: FirstStageRun, folder: RunFolder, images: Tensor, held_out: Tensor | None
) -> Callable[[L.Trainer], None]:
    target = config.first_stage.target
    assert target is not None  # ensured by `build`

    def export(trainer: L.Trainer) -> None:
        vq = averaged(trainer, FirstStageModule).vq.eval()
        info: dict[str, Any] = {"step": trainer.global_step, COUNT: len(images)}
        if trainer.global_step <= config.codebook.continuous_steps:
            info["codebook"] = "not trained"
            logger.warning(f"step {trainer.global_step}: the codebook is not trained yet (codebook.continuous_steps)")
        if held_out is not None:
            with decoration("held-out PSNR"):
                info["held_out_psnr_db"] = round(held_out_psnr(vq, held_out), 2)
                logger.info(f"step {trainer.global_step}: held-out PSNR {info['held_out_psnr_db']} dB")
        scale = latent_scale(vq, images[:: max(1, len(images) // 512)])
        card = FirstStageCard(WEIGHTS, target, config.first_stage.params, round(scale, 6), info)
        write_folder(folder.model, card, vq.state_dict(), getattr(torch, config.logging.export_dtype))

    return export
