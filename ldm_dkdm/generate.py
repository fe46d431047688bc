"""From seeds to pictures: seeds -> sampler -> codec -> batches of uint8 images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_dkdm.diffusion.samplers import Denoise, ImageNoise, ddim, ddpm, dpm_solver, last
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.rng import numpy_generator


@dataclass(frozen=True)
class SamplerConfig:
    """What to draw: image i of `count` depends on seed + i only (and on its label)."""

    count: int
    batch_size: int = 64
    seed: int = 0
    steps: int = 200
    eta: float = 0.0  # DDIM's
    sampler: str = "ddim"  # ddim, ddpm or dpm-solver++
    labels: tuple[int, ...] = ()  # in turn, for a class-conditional model; default: one by each image's seed


class Decoder(Protocol):
    """A first stage, as far as sampling needs it."""

    def decode(self, states: Tensor) -> Tensor:
        """States (B,C,h,w) -> images uint8 (B,H,W,3)."""


def labels_of(config: SamplerConfig, first: int, count: int, classes: Sequence[int] | None) -> Tensor | None:
    """Labels (count,) of the images first ... first+count-1; None for an unconditional model."""
    if classes is None:
        return None
    if config.labels:
        return torch.tensor([config.labels[i % len(config.labels)] for i in range(first, first + count)])
    draws = [
        numpy_generator(config.seed + i, 0, 0, "label").integers(len(classes)) for i in range(first, first + count)
    ]
    return torch.tensor([classes[draw] for draw in draws])


def sample_states(
    denoise: Denoise,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    config: SamplerConfig,
    device: torch.device | str = "cpu",
    classes: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield batches of x_0 (B,C,H,W) and their labels (B,) until `config.count` are drawn.

    Args:
        classes: the labels of a class-conditional model; None for an unconditional one.
    """
    for start in range(0, config.count, config.batch_size):
        count = min(config.batch_size, config.count - start)
        noise = ImageNoise([config.seed + start + i for i in range(count)], shape, device)
        label = labels_of(config, start, count, classes)
        label = None if label is None else label.to(device)
        x_T = noise()
        if config.sampler == "ddpm":
            yield last(ddpm(schedule, denoise, x_T, noise, config.steps, label)), label
        elif config.sampler == "dpm-solver++":
            yield last(dpm_solver(schedule, denoise, x_T, config.steps, label)), label
        else:
            yield last(ddim(schedule, denoise, x_T, noise, config.steps, config.eta, label)), label


def sample_images(
    denoise: Denoise,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    codec: Decoder,
    config: SamplerConfig,
    device: torch.device | str = "cpu",
    classes: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield batches of images uint8 (B,H,W,3), on the CPU."""
    for states, _ in sample_states(denoise, schedule, shape, config, device, classes):
        yield codec.decode(states).cpu()
