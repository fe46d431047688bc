"""CompVis's layout: UNet, its EMA and the first stage in one state dict."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError

UNET = "model.diffusion_model."
EMA = "model_ema."
FIRST_STAGE = "first_stage_model."


def ema_name(parameter: str) -> str:
    """CompVis's EMA key of a UNet parameter: its full name without the `model.` prefix and without dots."""
    return EMA + (UNET.removeprefix("model.") + parameter).replace(".", "")


def check_schedule(stored: Tensor, schedule: NoiseSchedule, source: str | Path) -> None:
    """Refuse a configured schedule that is not the `alphas_cumprod` (T,) that a checkpoint was trained with."""
    wanted = schedule.alphas_cumprod
    if stored.shape != wanted.shape or not torch.allclose(stored.double(), wanted, rtol=tolerance(stored), atol=1e-6):
        raise UserError(
            f"diffusion: {source} was trained with {_ends(stored)}, the configuration gives {_ends(wanted)}; "
            "correct schedule, num_timesteps, beta_start or beta_end"
        )


def tolerance(stored: Tensor) -> float:
    """How far a stored schedule may lie from a configured one, relatively: 0.1%, or what its precision leaves."""
    return max(1e-3, torch.finfo(stored.dtype).eps)


def _ends(abar: Tensor) -> str:
    return f"T = {len(abar)}, alphas_cumprod {abar[0]:.6f} ... {abar[len(abar) // 2]:.6f} ... {abar[-1]:.6f}"


def first_stage_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first stage inside a checkpoint, under its own names, without its training loss; may be empty."""
    found = under(tensors, FIRST_STAGE)
    return {name: tensor for name, tensor in found.items() if not name.startswith("loss.")}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
