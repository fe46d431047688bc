"""Samplers: generators that yield the state after every step, over any denoiser (x, t, label) -> Prediction."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.diffusion.process import reverse_to, x0_to_eps
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.diffusion.timesteps import of_ddim, of_ddpm, of_solver
from ldm_dkdm.records import Prediction

Denoise = Callable[[Tensor, Tensor, Tensor | None], Prediction]
Noise = Callable[[], Tensor]


class ImageNoise:
    """Gaussian noise in which image i depends on its own seed only, whatever the batch or the device.

    Args:
        seeds: one per image.
        shape: (C,H,W) of one image's noise.
        device: where the noise is wanted.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """The next draw (B,C,H,W), float32."""
        draws = [torch.randn(self.shape, generator=g, dtype=torch.float32, device=g.device) for g in self.generators]
        return torch.stack(draws).to(self.device)


def ddpm(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x: Tensor,
    noise: Noise,
    steps: int | None = None,
    label: Tensor | None = None,
    eta: float = 1.0,
) -> Iterator[Tensor]:
    """Ancestral sampling from x_T (B,C,H,W) through `steps` of the T timesteps, all of them by default.

    Alg. 3, with the variance that the model learned or the posterior's; last yields x_0. Fewer steps
    respace the process (Improved DDPM, Sec. 4). eta is ignored: the variance is the model's.
    """
    timesteps = of_ddpm(schedule, steps or schedule.num_timesteps)
    for step, following in _downwards(timesteps, -1):
        t, t_next = (torch.full((len(x),), value, device=x.device) for value in (step, following))
        x = reverse_to(schedule, x, t, t_next, denoise(x, t, label), noise())
        yield x


def ddim(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x: Tensor,
    noise: Noise,
    steps: int,
    label: Tensor | None = None,
    eta: float = 0.0,
    timesteps: list[int] | None = None,
) -> Iterator[Tensor]:
    """DDIM, Eq. 12 and 16, from x_T (B,C,H,W); last yields the sample.

    The schedule says which timesteps (`timestep_spacing`, `steps_offset`), and whether the last target is x_0 or abar_0
    (`set_alpha_to_one`). Other `timesteps`, ascending, end at x_0.
    """
    end = -1 if schedule.set_alpha_to_one or timesteps is not None else 0
    for step, following in _downwards(timesteps or of_ddim(schedule, steps), end):
        t = torch.full((len(x),), step, device=x.device)
        x_0 = denoise(x, t, label).x_0
        eps = x0_to_eps(schedule, x, t, x_0)  # again, since pixel space clips x_0
        abar = schedule.alphas_cumprod[step].item()
        abar_next = schedule.alphas_cumprod[following].item() if following >= 0 else 1.0
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * x_0 + max(0.0, 1 - abar_next - sigma**2) ** 0.5 * eps  # below 0 by rounding
        if eta > 0:
            x = x + sigma * noise()
        yield x


def dpm_solver(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x: Tensor,
    noise: Noise,
    steps: int,
    label: Tensor | None = None,
    eta: float = 0.0,
    start: float = 0.0,
    timesteps: list[int] | None = None,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) from x_T (B,C,H,W), deterministic; last yields x_0 (Lu et al. 2022, Alg. 2).

    It draws no noise and ignores eta. Its timesteps are `of_solver` or those given, ascending; those whose abar
    is below `start` are skipped. From abar = 0 the first step is the limit of ever less signal. The first and the last
    step are of first order: the first has no predecessor, the last ends at x_0.
    """
    abar = schedule.alphas_cumprod
    lam = 0.5 * (abar / (1 - abar)).log()  # half the log signal-to-noise ratio
    x_0_before, h_before = None, 0.0
    timesteps = [t for t in timesteps or of_solver(schedule, steps) if abar[t] >= start]
    for step, following in _downwards(timesteps, -1):
        t = torch.full((len(x),), step, device=x.device)
        x_0 = denoise(x, t, label).x_0
        if following < 0:
            yield x_0
            return
        h = (lam[following] - lam[step]).item()
        direction = x_0
        if x_0_before is not None:
            direction = x_0 + (x_0 - x_0_before) * (0.5 * h / h_before)
        shrink = ((1 - abar[following]) / (1 - abar[step])).sqrt().item()
        x = shrink * x - abar[following].sqrt().item() * math.expm1(-h) * direction
        x_0_before, h_before = x_0, h
        yield x


def _downwards(timesteps: list[int], end: int) -> Iterator[tuple[int, int]]:
    """Pairs (t, the t after it) from the highest timestep down to `end`."""
    return zip(reversed(timesteps), reversed([end, *timesteps[:-1]]), strict=True)


@dataclass(frozen=True)
class Sampler:
    """A sampler and what callers need to know about it.

    Attributes:
        walk: (schedule, denoise, x_T, noise, steps, label, eta) -> iterator of states; the last one is the sample.
        timesteps: (schedule, steps) -> the timesteps at which the model is called.
        default_steps: steps if none are given; None means all T.
        takes_eta: whether `eta` has an effect. takes_timesteps: whether `walk` takes `timesteps`.
    """

    walk: Callable[..., Iterator[Tensor]]
    timesteps: Callable[[NoiseSchedule, int], list[int]]
    default_steps: int | None = 200
    takes_eta: bool = False
    takes_timesteps: bool = False


SAMPLERS = {
    "ddim": Sampler(ddim, of_ddim, takes_eta=True, takes_timesteps=True),
    "ddpm": Sampler(ddpm, of_ddpm, default_steps=None),
    "dpm-solver++": Sampler(dpm_solver, of_solver, takes_timesteps=True),
}


def last(states: Iterator[Tensor]) -> Tensor:
    """The final state of a sampler."""
    for state in states:
        x = state
    return x
