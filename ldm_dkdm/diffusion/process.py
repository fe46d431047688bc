"""The forward process and one reverse step. x and eps are (B,C,H,W), t is (B,); coefficients are float64
until they meet x, whose type the results keep.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.records import Prediction


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    return a.to(x) * x + b.to(x) * y


def q_sample(schedule: NoiseSchedule, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, Eq. 4)."""
    abar = schedule.alpha_bar(t, x_0)
    return _mix(abar.sqrt(), x_0, (1 - abar).sqrt(), noise)


def eps_to_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); it has no value where abar_t = 0."""
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


def v_to_x0(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v (Salimans & Ho 2022, App. D)."""
    abar = schedule.alpha_bar(t, x_t)
    return _mix(abar.sqrt(), x_t, -(1 - abar).sqrt(), v)


@dataclass(frozen=True)
class Parameterization:
    """What a network's output means: functions (schedule, x_t, t, output) -> eps and -> x_0."""

    eps: Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
    x_0: Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]


PARAMETERIZATIONS = {
    "eps": Parameterization(lambda schedule, x_t, t, eps: eps, eps_to_x0),
    "v": Parameterization(v_to_eps, v_to_x0),
    "x0": Parameterization(x0_to_eps, lambda schedule, x_t, t, x_0: x_0),
}


def posterior(schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B,C,H,W) and variance (B,1,1,1) of q(x_{t_next} | x_t, x_0) for any t_next < t.

    DDPM, Eq. 7, with alpha_t replaced by abar_t / abar_{t_next}; t_next = -1 is x_0 itself.
    """
    abar, abar_next = schedule.alpha_bar(t, x_t), schedule.alpha_bar(t_next, x_t)
    alpha = abar / abar_next
    to_x0 = abar_next.sqrt() * (1 - alpha) / (1 - abar)
    to_xt = alpha.sqrt() * (1 - abar_next) / (1 - abar)
    return _mix(to_x0, x_0, to_xt, x_t), _posterior_variance(abar, abar_next).to(x_t)


def _posterior_variance(abar: Tensor, abar_next: Tensor) -> Tensor:
    return (1 - abar / abar_next) * (1 - abar_next) / (1 - abar)


def learned_log_variance(schedule: NoiseSchedule, t: Tensor, t_next: Tensor, fraction: Tensor) -> Tensor:
    """log Sigma = f log(beta) + (1 - f) log(beta~), f = (fraction + 1) / 2 (Improved DDPM, Eq. 15).

    beta~ is the posterior's variance, beta = 1 - abar_t / abar_{t_next}. At t_next = -1, where beta~ is 0,
    that of the step before replaces it, as in the authors' code.
    """
    beta = 1 - schedule.alpha_bar(t, fraction) / schedule.alpha_bar(t_next, fraction)
    before = (t_next < 0).long() * (t - t_next).clamp(max=schedule.num_timesteps - 1 - t)
    abar, abar_next = schedule.alpha_bar(t + before, fraction), schedule.alpha_bar(t_next + before, fraction)
    beta_tilde = _posterior_variance(abar, abar_next).clamp(min=1e-20)
    weight = (fraction + 1) / 2
    return weight * beta.log().to(fraction) + (1 - weight) * beta_tilde.log().to(fraction)


def uncertainty(schedule: NoiseSchedule, t: Tensor, eps: Tensor) -> Tensor:
    """Variance (B,1,1,1) of x_0 given x_t, mean over elements (Analytic-DPM, Bao et al. 2022, Eq. 8).

    For a posterior mean eps, E[(eps_true - eps)^2] = 1 - E[eps^2], and x_0 errs by eps's error times (1 - abar) / abar.
    The estimate from one state is noisy near T; it is kept within the variance of states, which is about 1. That is
    also the value at abar = 0, where x_t says nothing.
    """
    unknown = 1 - eps.square().mean((1, 2, 3), keepdim=True)
    abar = schedule.alpha_bar(t, eps)
    found = ((1 - abar) / abar).to(eps) * unknown
    return torch.where((abar > 0), found.clamp(0, 1), 1.0)


def reverse_to(
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    prediction: Prediction,
    noise: Tensor,
    optimal: bool = False,
) -> Tensor:
    """x_{t_next} from one prediction (Alg. 3, line 4), with its learned variance or the schedule's fixed one.

    `optimal`: a posterior's variance also holds what the prediction of x_0 leaves open, without which long steps lose
    variance (Analytic-DPM, Thm. 1).
    """
    mean, variance = posterior(schedule, prediction.x_0, x_t, t, t_next)
    if schedule.variance == "beta" and not optimal:
        beta = 1 - schedule.alpha_bar(t, x_t) / schedule.alpha_bar(t_next, x_t)
        variance = beta.to(x_t) * (t_next >= 0).view(-1, 1, 1, 1)  # the last step adds no noise
    if optimal and prediction.var_fraction is None:
        abar, abar_next = schedule.alpha_bar(t, x_t), schedule.alpha_bar(t_next, x_t)
        to_x0 = abar_next.sqrt() * (1 - abar / abar_next) / (1 - abar)
        inside = (t_next >= 0).view(-1, 1, 1, 1)  # x_0 itself is the mean
        variance = variance + inside * to_x0.square().to(x_t) * uncertainty(schedule, t, prediction.eps)
    if prediction.var_fraction is not None:
        variance = learned_log_variance(schedule, t, t_next, prediction.var_fraction).exp()
        variance = variance * (t_next >= 0).view(-1, 1, 1, 1)  # the last step adds no noise
    return mean + variance.sqrt() * noise


def reverse_step(
    schedule: NoiseSchedule, x_t: Tensor, t: Tensor, prediction: Prediction, noise: Tensor, stride: int | Tensor = 1
) -> Tensor:
    """x_{t-stride}, one stride or one for each of (B,); past t = 0 it is x_0.

    Strides above 1 respace the posterior, with the optimal variance; a stride of 1 is the paper's step.
    """
    optimal = not (isinstance(stride, int) and stride == 1)
    return reverse_to(schedule, x_t, t, torch.clamp(t - stride, min=-1), prediction, noise, optimal)
