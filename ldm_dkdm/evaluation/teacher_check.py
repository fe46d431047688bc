"""Check in seconds, before a distillation, that a teacher denoises its own samples.

The model draws a few samples, noises them again and predicts the noise. The errors separate a trained network from a
scrambled one, and the right configuration of its weights from a wrong one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.samplers import dpm_solver, last
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.interpretations import other_interpretations
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.first_stage.scale import scale_figures
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import logger
from ldm_dkdm.rng import torch_generator

IMAGES, STEPS = 8, 10
START = 1e-3  # abar where the sampler begins: below it x_0 magnifies errors, in unclipped latents beyond use
COMPARED = 32  # images for comparing configurations
QUANTILES = (0.9, 0.75, 0.5, 0.25, 0.1)  # shares of T to which the samples are noised
LEVELS = (0.2, 0.5, 0.8, 0.95)  # abar where configurations are compared: equal noise, whatever its t in a schedule
NOISY = (0.05, 0.2)  # abar where biases are measured: predictions hardly depend on errors of the samples there
BIASED, UNBIASED = 4.0, 2.0  # standard errors of the bias
# These bounds separate the good and the faulty teachers in docs/teacher-check.md.
ALIGNED = 0.7  # smallest cosine of eps and pure noise at T-1
LINEAR = 0.7  # largest eps error at T/4, in units of the best linear denoiser's
UNCALIBRATED = 0.15  # largest |rms of eps - sqrt(1 - its error)|, which vanishes for a posterior mean
BETTER = 0.85  # an alternative is preferred if its error is below this fraction of the configuration's
SIGMAS = 3.0  # and lower by this many standard errors


@dataclass(frozen=True)
class Row:
    """At timestep t: mean squared errors of eps and (in units of the samples' variance) of x_0, rms of eps."""

    t: int
    eps_error: float
    x0_error: float
    scale: float

    @property
    def deviation(self) -> float:
        """How far the scale is from that of a posterior mean with this error."""
        return abs(self.scale - math.sqrt(max(0.0, 1 - self.eps_error)))


@dataclass(frozen=True)
class CheckFigures:
    """Figures of a teacher's predictions on its own samples.

    Args:
        cosine: that of eps and its input, pure noise at T-1.
        rows: from near T to near 0.
        linear: eps error at T/4 in units of the best linear denoiser's.
        log_errors: (n,) mean logarithm of each image's eps errors at `LEVELS`.
        biases: (n,) mean of each image's eps_hat (eps_hat - eps) at `NOISY`: 0 on average for a posterior mean.
        samples: (n,C,H,W) the teacher's samples themselves.
    """

    cosine: float
    rows: tuple[Row, ...]
    linear: float
    log_errors: Tensor
    biases: Tensor
    samples: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"), repr=False)

    @property
    def bias(self) -> float:
        """Mean of the biases: how far the predictions are from being orthogonal to their errors."""
        return self.biases.mean().item()

    @property
    def bias_sigmas(self) -> float:
        """The size of the bias in standard errors."""
        return abs(self.bias) / (self.biases.std().item() / math.sqrt(len(self.biases)) + 1e-12)

    @property
    def error(self) -> float:
        """Geometric mean of the eps errors at `LEVELS`."""
        return self.log_errors.mean().exp().item()

    @property
    def deviation(self) -> float:
        """The largest deviation of the scale, down to T/4."""
        return max(row.deviation for row in self.rows[:-1])

    @property
    def finite(self) -> bool:
        """Whether every figure is a number."""
        return all(map(math.isfinite, (self.cosine, self.linear, self.error, self.deviation)))


@torch.no_grad()
def measure(teacher: DiffusionModel, images: int = IMAGES) -> CheckFigures:
    """Sample, noise, predict: 20 calls of `images` states, always from the same noise, on the model's device."""
    device = teacher.device
    generator = torch_generator(0, 0, 0, "warmup", device)
    noise = torch.randn((images, *teacher.shape), generator=generator, dtype=torch.float32, device=device)
    label = teacher.draw_labels(images, generator)
    schedule, final = teacher.schedule, teacher.schedule.num_timesteps - 1
    at_T = teacher.predict(noise, torch.full((images,), final, device=device), label).eps
    x_0 = last(dpm_solver(schedule, teacher.predict, noise, lambda: noise, min(STEPS, final + 1), label, start=START))
    rows, linear = [], math.nan
    for quantile in QUANTILES:
        t = torch.full((images,), round(quantile * final), device=device)
        eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device=device)
        prediction = teacher.predict(q_sample(schedule, x_0, t, eps), t, label)
        error = (prediction.eps - eps).square().mean().item()
        x0_error = ((prediction.x_0 - x_0).square().mean() / x_0.var()).item()
        rows.append(Row(int(t[0]), error, x0_error, prediction.eps.square().mean().sqrt().item()))
        if quantile == QUANTILES[-2]:
            linear = error / _linear_error(schedule.alpha_bar(t[:1], x_0).item(), x_0)
    cosine = F.cosine_similarity(at_T.flatten(1), noise.flatten(1)).mean().item()
    return CheckFigures(cosine, tuple(rows), linear, *_of_images(teacher, x_0, label, generator), x_0)


def _of_images(
    teacher: DiffusionModel, x_0: Tensor, label: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """log_errors and biases (n,) of every image."""
    errors, biases = [], []
    for abar in dict.fromkeys((*LEVELS, *NOISY)):
        step = int((teacher.schedule.alphas_cumprod - abar).abs().argmin())
        t = torch.full((len(x_0),), step, device=x_0.device)
        eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device=x_0.device)
        found = teacher.predict(q_sample(teacher.schedule, x_0, t, eps), t, label).eps
        if abar in LEVELS:
            errors.append((found - eps).square().flatten(1).mean(1).log())
        if abar in NOISY:
            biases.append((found * (found - eps)).flatten(1).mean(1))
    return torch.stack(errors).mean(0), torch.stack(biases).mean(0)


def _linear_error(abar: float, x_0: Tensor) -> float:
    """eps error of the best linear denoiser without memory of positions: abar s^2 / (abar s^2 + 1 - abar)."""
    signal = abar * x_0.var().item()
    return signal / (signal + 1 - abar)


def fault(figures: CheckFigures) -> str | None:
    """What is wrong with a teacher by its own figures; None if nothing is."""
    if not figures.finite:
        return "its predictions are not finite; the weights are damaged or overflow in this precision"
    if figures.cosine < ALIGNED:
        return (
            f"at t = T-1 its eps does not point along pure noise (cosine {figures.cosine:.2f}, expected above "
            f"{ALIGNED}); the weights are random or scrambled, or the parameterization is wrong"
        )
    if figures.linear > LINEAR:
        return (
            f"it denoises its own samples no better than a linear filter ({figures.linear:.2f} of that error at T/4, "
            f"expected below {LINEAR}); the weights are random, scrambled, or loaded into a wrong architecture"
        )
    if figures.rows[-1].x0_error > figures.rows[0].x0_error:
        return (
            f"its x_0 does not come closer as t falls (error {figures.rows[0].x0_error:.2f} near T, "
            f"{figures.rows[-1].x0_error:.2f} near 0); the weights are damaged or loaded into a wrong architecture"
        )
    if figures.deviation > UNCALIBRATED:
        return (
            f"the scale of its eps is off by {figures.deviation:.2f} (expected below {UNCALIBRATED}); the schedule "
            "(schedule, num_timesteps, betas) or the parameterization is not that of these weights"
        )
    return None


def preferred(own: CheckFigures, other: CheckFigures) -> bool:
    """Whether an alternative fits the weights so much better that the configuration must be wrong.

    Both start from the same noise, so that images are compared one by one.
    """
    if not other.finite or fault(other):
        return False
    gain = own.log_errors - other.log_errors
    sure = bool(gain.mean() > SIGMAS * gain.std() / math.sqrt(len(gain)))
    return (sure and other.error < BETTER * own.error) or less_biased(own, other)


def less_biased(own: CheckFigures, other: CheckFigures) -> bool:
    """Whether only the alternative predicts posterior means.

    A wrong configuration can draw simpler samples and so have the smaller error on them, but it is not calibrated:
    E[eps_hat (eps_hat - eps)] = 0 holds for the mean of eps given x_t, whatever the samples are.
    """
    return own.bias_sigmas > BIASED and other.bias_sigmas < UNBIASED and abs(other.bias) < 0.5 * abs(own.bias)


def check_teacher(model: DiffusionModel) -> CheckFigures:
    """Refuse a model that does not denoise its own samples, or whose weights fit an alternative much better.

    Guidance is switched off: guided predictions are not posterior means. A model that describes itself (a model folder,
    a diffusers pipeline) is not compared with alternatives, and one whose file stores its schedule with none of those.

    Raises:
        UserError: the figure that failed, its value, what is expected, and the likely cause.
    """
    plain = model.changed(guidance=1.0)
    own = measure(plain, IMAGES if model.described else COMPARED)
    reason = fault(own)
    if not model.described and own.finite:
        _refuse_better(plain, own)
    if reason:
        raise UserError(f"{model.path or 'the model'}: {reason}")
    _refuse_scale(model, own.samples)
    return own


def _refuse_scale(model: DiffusionModel, samples: Tensor) -> None:
    """Refuse a scale of the latents that no file states beyond doubt and that the teacher's samples contradict.

    It is asked for rather than taken, so that the run's config says it, also to a run that is resumed.
    """
    codec = model.codec() if model.first_stage is not None else None
    if not isinstance(codec, LatentCodec) or not codec.doubt:
        return
    figures, key = scale_figures(codec, samples), model.hints.key("scale_factor")
    if figures.best != figures.own:
        raise UserError(
            f"{model.path or 'the model'}: {codec.doubt}, but its samples fit {figures.best:g} ({figures}); "
            f"set {key}={figures.best:g}, or {key}={figures.own:g} if that is meant"
        )
    logger.info(f"scale_factor: {figures.own:g} fits the teacher's samples ({figures})")


def _refuse_better(model: DiffusionModel, own: CheckFigures) -> None:
    measured = ((words, measure(other, COMPARED)) for words, other in other_interpretations(model))
    words, best = best_of(own, {words: figures for words, figures in measured if preferred(own, figures)})
    if best is own:
        return
    shown = f"eps error {best.error:.3f} instead of {own.error:.3f}"
    if less_biased(own, best):
        shown = f"bias of eps {best.bias:.4f} instead of {own.bias:.4f}"
    raise UserError(
        f"{model.path or 'the model'}: its weights fit {words} better than the configuration ({shown}); correct it"
    )


def best_of(own: CheckFigures, better: Mapping[str, CheckFigures]) -> tuple[str, CheckFigures]:
    """The best of the preferred alternatives: above all one whose bias vanishes, then the smallest error."""
    order = sorted(better.items(), key=lambda item: (item[1].bias_sigmas >= UNBIASED, item[1].error))
    return order[0] if order else ("", own)
