"""Objectives: one value per sample (B,); the caller reduces and logs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm_dkdm.diffusion.process import eps_to_x0, learned_log_variance, posterior
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import pick
from ldm_dkdm.records import Prediction


def simple_loss(target_eps: Tensor, eps: Tensor) -> Tensor:
    """L'_simple = ||eps_T - eps_S||^2, mean over elements (DKDM; with true noise as target, Eq. 11)."""
    return (target_eps.float() - eps.float()).square().flatten(1).mean(1)


# factor of abar_t (B,) that turns a squared error of eps into one of this space
LOSS_SPACES: dict[str, Callable[[Tensor], Tensor]] = {
    "eps": torch.ones_like,  # the paper
    "v": lambda abar: 1 / abar,
    "x0": lambda abar: (1 - abar) / abar,
}


def loss_weight(schedule: NoiseSchedule, t: Tensor, space: str, cap: float | None = None) -> Tensor:
    """Factor (B,) that turns an eps error at t into an error of `space` (one of LOSS_SPACES), at most `cap`.

    At abar = 0 it is 0: eps is x_t there, whatever the network says.
    """
    abar = schedule.alpha_bar(t, t)
    weight = pick(LOSS_SPACES, space, "space")(abar).clamp(max=cap or float("inf"))
    return torch.where(abar > 0, weight, 0.0).float().to(t.device)


def space_loss(
    schedule: NoiseSchedule, t: Tensor, target: Prediction, prediction: Prediction, space: str, cap: float | None = None
) -> Tensor:
    """The squared error (B,) in `space` (one of LOSS_SPACES): the eps error, weighted.

    At abar = 0, where v is -x_0, it is the error of x_0.
    """
    loss = loss_weight(schedule, t, space, cap) * simple_loss(target.eps, prediction.eps)
    if not schedule.ends_in_noise:
        return loss
    return loss + (schedule.alpha_bar(t, t) == 0).to(loss) * simple_loss(target.x_0, prediction.x_0)


def vlb_loss(
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    target: Prediction,
    prediction: Prediction,
    clip_student: bool = False,
) -> Tensor:
    """L'_vlb = KL(p_T(x_{t-1}|x_t) || p_S(x_{t-1}|x_t)) at every t, in bits per dimension (DKDM).

    The prediction's mean is detached: this term trains its variance only. Its x_0 is the one that eps means, as in
    Improved DDPM's training code, or with `clip_student` the one of sampling, which pixel space clips as it does the
    target's; then a student equal to its teacher has no loss. A target without a variance is data: then p_T is the
    posterior q(x_{t-1}|x_t,x_0), and at t = 0 the term is the negative log-likelihood of the pixels (Improved DDPM,
    Eq. 4-7; L_vlb of Alg. 2).
    """
    known = schedule.alpha_bar(t, x_t) > 0  # else eps says nothing about x_0
    x_0 = prediction.x_0 if clip_student else eps_to_x0(schedule, x_t, t, prediction.eps)
    x_0 = torch.where(known, x_0, prediction.x_0)
    assert prediction.var_fraction is not None  # the network learns its variance
    from_data = target.var_fraction is None
    mean, _ = posterior(schedule, x_0.detach(), x_t, t, t - 1)
    log_variance = learned_log_variance(schedule, t, t - 1, prediction.var_fraction)
    target_mean, _ = posterior(schedule, target.x_0, x_t, t, t - 1)
    fraction = torch.full_like(x_t, -1.0) if target.var_fraction is None else target.var_fraction
    loss = gaussian_kl(target_mean, learned_log_variance(schedule, t, t - 1, fraction), mean, log_variance)
    if from_data:
        likelihood = -pixel_log_likelihood(target.x_0, mean, log_variance)
        loss = torch.where((t == 0).view(-1, 1, 1, 1), likelihood, loss)
    return loss.flatten(1).mean(1) / math.log(2)


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of elementwise Gaussians, in nats."""
    distance = (mean_p - mean_q).square() * (-log_var_q).exp()
    return 0.5 * (log_var_q - log_var_p + (log_var_p - log_var_q).exp() + distance - 1)


def pixel_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that a Gaussian gives to each 8-bit pixel of x_0 in [-1,1], in nats (DDPM, Eq. 13)."""

    def cdf(edge: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((edge - mean) * (-0.5 * log_variance).exp() / math.sqrt(2)))

    upper = torch.where(x_0 > 0.999, 1.0, cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, cdf(x_0 - 1 / 255))
    return (upper - lower).clamp(min=1e-12).log()
