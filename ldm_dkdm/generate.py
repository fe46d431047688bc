"""From seeds to pictures: seeds -> sampler -> codec -> batches of uint8 images."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.diffusion.samplers import Denoise, ImageNoise, ddim, ddpm, last
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage.codec import LatentCodec


@dataclass(frozen=True)
class SamplerConfig:
    """What to draw: image i of `count` depends on seed + i only."""

    count: int
    batch_size: int = 64
    seed: int = 0
    steps: int = 200  # DDIM
    eta: float = 0.0
    vanilla: bool = False  # DDPM: all T ancestral steps


def sample_latents(
    denoise: Denoise,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    config: SamplerConfig,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield batches of latents (B,C,H,W) until `config.count` are drawn."""
    for start in range(0, config.count, config.batch_size):
        seeds = [config.seed + i for i in range(start, min(start + config.batch_size, config.count))]
        noise = ImageNoise(seeds, shape, device)
        x_T = noise()
        if config.vanilla:
            yield last(ddpm(schedule, denoise, x_T, noise))
        else:
            yield last(ddim(schedule, denoise, x_T, noise, config.steps, config.eta))


def sample_images(
    denoise: Denoise,
    schedule: NoiseSchedule,
    shape: tuple[int, int, int],
    codec: LatentCodec,
    config: SamplerConfig,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield batches of images uint8 (B,H,W,3), on the CPU."""
    for latents in sample_latents(denoise, schedule, shape, config, device):
        yield codec.decode(latents).cpu()
