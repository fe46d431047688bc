"""The forward process and one reverse step. x and eps are (B,C,H,W), t is (B,); coefficients are float64
until they meet x, whose type the results keep."""

import torch
from torch import Tensor

from ldm_dkdm.diffusion.schedule import NoiseSchedule


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return a.to(x) * x + b.to(x) * y


def q_sample(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, Eq. 4)."""
    abar = schedule.alpha_bar(t, x_0)
    return _mix(abar.sqrt(), x_0, (1 - abar).sqrt(), noise)


def eps_to_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    abar = schedule.alpha_bar(t, x_t)
    return _mix(abar.rsqrt(), x_t, -(1 / abar - 1).sqrt(), eps)


def x0_to_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
    """eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
    abar = schedule.alpha_bar(t, x_t)
    return _mix((1 - abar).rsqrt(), x_t, -(abar / (1 - abar)).sqrt(), x_0)


def v_to_eps(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t (Salimans & Ho 2022, App. D)."""
    abar = schedule.alpha_bar(t, x_t)
    return _mix(abar.sqrt(), v, (1 - abar).sqrt(), x_t)


def eps_to_v(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, in terms of x_t and eps."""
    abar = schedule.alpha_bar(t, x_t)
    return _mix(abar.rsqrt(), eps, -((1 - abar) / abar).sqrt(), x_t)


def posterior(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B,C,H,W) and variance (B,1,1,1) of q(x_{t_next} | x_t, x_0) for any t_next < t.

    DDPM, Eq. 7, with alpha_t replaced by abar_t / abar_{t_next}; t_next = -1 is x_0 itself.
    """
    abar, abar_next = schedule.alpha_bar(t, x_t), schedule.alpha_bar(t_next, x_t)
    alpha = abar / abar_next
    to_x0 = abar_next.sqrt() * (1 - alpha) / (1 - abar)
    to_xt = alpha.sqrt() * (1 - abar_next) / (1 - abar)
    variance = (1 - alpha) * (1 - abar_next) / (1 - abar)
    return _mix(to_x0, x_0, to_xt, x_t), variance.to(x_t)


def reverse_step(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor, noise: Tensor, stride: int = 1
) -> Tensor:
    """x_{t-stride} from one prediction, with the fixed posterior variance (Alg. 3, line 4; no clipping).

    A stride > 1 uses the respaced posterior of the same prediction; a step past t = 0 ends at x_0.
    """
    t_next = torch.clamp(t - stride, min=-1)
    mean, variance = posterior(schedule, eps_to_x0(schedule, x_t, t, eps), x_t, t, t_next)
    return mean + variance.sqrt() * noise
