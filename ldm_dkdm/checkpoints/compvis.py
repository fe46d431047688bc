"""CompVis's layout: UNet, its EMA and the first stage in one state dict."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError

UNET = "model.diffusion_model."
EMA = "model_ema."
FIRST_STAGE = "first_stage_model."


def ema_name(parameter: str) -> str:
    """CompVis's EMA key of a UNet parameter: its full name without the `model.` prefix and without dots."""
    return EMA + (UNET.removeprefix("model.") + parameter).replace(".", "")


def load_unet(network: nn.Module, tensors: Mapping[str, Tensor], use_ema: bool, source: str | Path) -> None:
    """Load the UNet of a CompVis checkpoint, EMA or raw weights."""
    names = [name for name, _ in network.named_parameters()]
    raw = _under(tensors, UNET)
    if not raw:
        raise UserError(f"{source}: no {UNET}* keys, so this is no CompVis latent diffusion checkpoint")
    if not use_ema:
        load_strictly(network, raw, source)
        return
    ema = {name: tensors[ema_name(name)] for name in names if ema_name(name) in tensors}
    if not ema:
        raise UserError(f"{source}: holds no EMA weights ({EMA}*); set teacher.use_ema=false to use the raw ones")
    load_strictly(network, ema, source)


def check_schedule(tensors: Mapping[str, Tensor], schedule: NoiseSchedule, source: str | Path) -> None:
    """Refuse a configured schedule that is not the one a checkpoint was trained with, where it stores that."""
    stored = tensors.get("alphas_cumprod")
    if stored is None:
        return
    wanted = schedule.alphas_cumprod
    if stored.shape != wanted.shape or not torch.allclose(stored.double(), wanted, rtol=1e-3, atol=1e-6):
        raise UserError(
            f"diffusion: {source} was trained with {_ends(stored)}, the configuration gives {_ends(wanted)}; "
            "correct schedule, num_timesteps, beta_start or beta_end"
        )


def _ends(abar: Tensor) -> str:
    return f"T = {len(abar)}, alphas_cumprod {abar[0]:.6f} ... {abar[len(abar) // 2]:.6f} ... {abar[-1]:.6f}"


def load_first_stage(vq: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load the first stage inside a CompVis checkpoint; the keys of its training loss are left."""
    found = _under(tensors, FIRST_STAGE)
    if not found:
        raise UserError(f"{source}: holds no first stage ({FIRST_STAGE}* keys); name its file in first_stage.ckpt")
    load_strictly(vq, _without(found, ("loss.",)), source)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _without(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(prefixes))}
