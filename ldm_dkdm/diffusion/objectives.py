"""Objectives: one value per sample (B,); the caller reduces and logs."""

from torch import Tensor

from ldm_dkdm.diffusion.schedule import NoiseSchedule


def simple_loss(target_eps: Tensor, eps: Tensor) -> Tensor:
    """L'_simple = ||eps_T - eps_S||^2, mean over elements (DKDM; with true noise as target, Eq. 11)."""
    return (target_eps.float() - eps.float()).square().flatten(1).mean(1)


def loss_weight(schedule: NoiseSchedule, t: Tensor, space: str, cap: float | None = None) -> Tensor:
    """Factor (B,) that turns an eps error at t into an error of `space`, at most `cap`.

    `eps`: 1 (the paper). `v`: 1 / abar_t. `x0`: (1 - abar_t) / abar_t.
    """
    abar = schedule.alpha_bar(t, t)
    weight = {"eps": abar**0, "v": 1 / abar, "x0": (1 - abar) / abar}[space]
    return weight.clamp(max=cap or float("inf")).float().to(t.device)
