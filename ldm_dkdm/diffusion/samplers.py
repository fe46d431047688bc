"""Samplers: generators that yield the state after every step, over any denoiser (x, t, label) -> Prediction."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ldm_dkdm.diffusion.process import eps_to_x0, reverse_step
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
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
        draws = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(draws).to(self.device)


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """CompVis's ascending DDIM timesteps: range(0, T, T // steps) + 1, kept below T.

    As there, a `steps` that does not divide T gives a few more timesteps. At steps = T nothing is added.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"sampling steps: {steps} is not between 1 and the {num_timesteps} diffusion steps")
    stride = num_timesteps // steps
    return [min(t + (stride > 1), num_timesteps - 1) for t in range(0, num_timesteps, stride)]


def ddpm(
    schedule: NoiseSchedule, denoise: Denoise, x: Tensor, noise: Noise, label: Tensor | None = None
) -> Iterator[Tensor]:
    """Ancestral sampling from x_T (B,C,H,W) through all T steps (Alg. 3, fixed variance); last yields x_0."""
    for step in reversed(range(schedule.num_timesteps)):
        t = torch.full((len(x),), step, device=x.device)
        x = reverse_step(schedule, x, t, denoise(x, t, label).eps, noise())
        yield x


def ddim(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x: Tensor,
    noise: Noise,
    steps: int,
    eta: float = 0.0,
    label: Tensor | None = None,
) -> Iterator[Tensor]:
    """DDIM, Eq. 12 and 16, from x_T (B,C,H,W); last yields the sample.

    Timesteps are CompVis's, and so is the last target: abar of t = 0, not 1.
    """
    timesteps = ddim_timesteps(schedule.num_timesteps, steps)
    for step, following in zip(reversed(timesteps), reversed([0, *timesteps[:-1]]), strict=True):
        t = torch.full((len(x),), step, device=x.device)
        eps = denoise(x, t, label).eps
        abar = schedule.alphas_cumprod[step].item()
        abar_next = schedule.alphas_cumprod[following].item()
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x_0 = eps_to_x0(schedule, x, t, eps)
        x = abar_next**0.5 * x_0 + (1 - abar_next - sigma**2) ** 0.5 * eps
        if eta > 0:
            x = x + sigma * noise()
        yield x


def last(states: Iterator[Tensor]) -> Tensor:
    """The final state of a sampler."""
    for state in states:
        x = state
    return x
