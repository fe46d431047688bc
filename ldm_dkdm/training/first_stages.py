"""Training a first stage on images."""

from collections.abc import Callable, Iterator

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ldm_dkdm.checkpoints.folder import write_folder
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import FirstStageCard, FirstStageRun, TrainerConfig
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.first_stage.vq import VQModel
from ldm_dkdm.first_stage.vqgan import FirstStageModule, held_out_psnr, latent_scale
from ldm_dkdm.images import endless_batches, load_images
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.folder import RunFolder, alone_in, check_run, go_on, open_run, step_of
from ldm_dkdm.training.interrupt import GracefulStop
from ldm_dkdm.training.loop import finished, fit, training_device
from ldm_dkdm.training.perceptual import lpips_loss
from ldm_dkdm.training.saving import RunCheckpoint

VQ_MODELS = {name: kind for name, kind in FIRST_STAGES.items() if kind is VQModel}


class _ImageStream(IterableDataset[Tensor]):
    """Image batches uint8 (B,H,W,3), the same after a resume."""

    def __init__(self, images: Tensor, batch_size: int, max_steps: int, seed: int, first_step: int) -> None:
        self.arguments = (images, batch_size, seed, first_step)
        self.max_steps = max_steps

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[Tensor]:
        return endless_batches(*self.arguments)


def train_first_stage(config: FirstStageRun, folder: RunFolder, resumed: bool = False) -> None:
    """Train to `trainer.max_steps`; a second call goes on where the first stopped."""
    device = training_device(config.trainer)
    precision = resolve_precision(config.trainer.precision, device)
    torch.manual_seed(config.trainer.seed)  # of the first weights
    vq = build(config.first_stage, VQ_MODELS, "first_stage.params")
    _refuse_unused(config)
    images = load_images(config.data.path, config.data.image_size)
    if config.data.batch_size > len(images):
        raise UserError(f"data.batch_size: {config.data.batch_size} is more than the {len(images)} images")
    held_out = load_images(config.data.held_out, config.data.image_size) if config.data.held_out else None
    perceptual = lpips_loss(config.loss.perceptual_backbone) if config.loss.perceptual else None
    module = FirstStageModule(vq, config, perceptual)
    check_run(config, folder, resumed)
    if end := finished(folder, config.trainer):
        print(f"{folder.path}: {end}")
        return

    def stream_for(trainer: L.Trainer) -> _ImageStream:
        latest = folder.latest()
        seed = config.trainer.seed + trainer.global_rank
        first_step = step_of(latest) if latest else 0
        return _ImageStream(images, config.data.batch_size, config.trainer.max_steps, seed, first_step)

    with alone_in(folder), GracefulStop() as stop:
        open_run(config, folder, resumed)
        export = _export_on_save(config, folder, images, held_out)
        saving = RunCheckpoint(folder.checkpoints, config.logging.save_every, export)
        fit(
            module, stream_for, config.trainer, config.logging, folder, [saving], stop, precision, go_on(config, folder)
        )


OWN_CHOICES = (
    "lr_schedule",
    "lr_warmup",
    "weight_decay",
    "grad_clip",
    "devices",
    "accumulate",
    "early_stop",
    "max_minutes",
)  # of the trainer section: this training decides them itself


def _refuse_unused(config: FirstStageRun) -> None:
    """Keys of the shared sections that this training decides itself."""
    defaults = TrainerConfig(max_steps=1, learning_rate=1.0)
    for key in OWN_CHOICES:
        if getattr(config.trainer, key) != getattr(defaults, key):
            raise UserError(
                f"trainer.{key}: the first stage trains on one device with its own schedule; remove the key"
            )
    for key in ("ckpt", "scale_factor"):
        if getattr(config.first_stage, key) is not None:
            raise UserError(f"first_stage.{key}: the training makes it; remove the key")


def _export_on_save(
    config: FirstStageRun, folder: RunFolder, images: Tensor, held_out: Tensor | None
) -> Callable[[L.Trainer], None]:
    def export(trainer: L.Trainer) -> None:
        vq: VQModel = averaged(trainer.callbacks).vq.eval()
        info = {"step": trainer.global_step}
        if held_out is not None:
            info["held_out_psnr_db"] = round(held_out_psnr(vq, held_out), 2)
            print(f"step {trainer.global_step}: held-out PSNR {info['held_out_psnr_db']} dB")
        scale = latent_scale(vq, images[:: max(1, len(images) // 512)])
        card = FirstStageCard(
            "model.safetensors", config.first_stage.target, config.first_stage.params, round(scale, 6), info
        )
        write_folder(folder.model, card, vq.state_dict(), getattr(torch, config.logging.export_dtype))

    return export
