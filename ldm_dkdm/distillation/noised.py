"""Fill the pool with samples of the teacher, noised to random t."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import WarmupConfig
from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.samplers import SAMPLERS
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.diffusion.timesteps import log_snr_timesteps
from ldm_dkdm.records import NoisyBatch, Prediction

if TYPE_CHECKING:
    from ldm_dkdm.distillation.warmup import Warmup

NOISED = 1024  # states noised at once: few samples can fill many slots


def noised_samples(warmup: "Warmup", generator: torch.Generator) -> Iterator[int]:
    """Noise each sample of the teacher to several random t: sample i fills the slots of its share.

    The mode names a sampler that needs no noise of its own. Yields the number of samples after each of its steps.
    """
    pool, teacher, config = warmup.pool, warmup.teacher, warmup.config
    images, schedule = min(config.images, len(pool)), teacher.schedule
    starts = torch.arange(images + 1, device="cpu") * len(pool) // images
    first = int(torch.searchsorted(starts, pool.filled))
    copies = starts.diff()[first : first + config.batch_size].to(warmup.device)
    noise, label = warmup.randn(len(copies), generator), teacher.draw_labels(len(copies), generator)

    def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        warmup.check()
        return teacher.predict(x, t, label)

    steps = steps_within(config, "steps", schedule.num_timesteps)
    walk, timesteps = SAMPLERS[config.mode].walk, spaced_timesteps(config, schedule)
    spaced = {} if timesteps is None else {"timesteps": timesteps}
    for state in walk(schedule, denoise, noise, lambda: noise, steps, label, **spaced):
        x_0 = state  # the last one is the sample
        yield len(copies)
    owner = torch.arange(len(copies), device=warmup.device).repeat_interleave(copies)
    quantiles = torch.rand(len(owner), generator=generator, dtype=torch.float32, device=generator.device)
    t = schedule.timesteps_at(quantiles, config.t_cap)
    x = torch.empty((len(owner), *x_0.shape[1:]), dtype=pool.x.dtype, device="cpu")
    for part in torch.arange(len(owner), device=warmup.device).split(NOISED):
        noise = warmup.randn(len(part), generator)
        x[part.cpu()] = q_sample(schedule, x_0[owner[part]], t[part], noise).to("cpu", x.dtype)
    pool.fill(NoisyBatch(x, t, None if label is None else label[owner]))


def spaced_timesteps(config: WarmupConfig, schedule: NoiseSchedule) -> list[int] | None:
    """The timesteps of the samples, even in log-SNR; None: the sampler chooses its own."""
    steps = steps_within(config, "steps", schedule.num_timesteps)
    return log_snr_timesteps(schedule, steps) if SAMPLERS[config.mode].takes_timesteps else None


def sampling_calls(config: WarmupConfig, slots: int, schedule: NoiseSchedule) -> int:
    """Single-sample teacher evaluations that fill so many slots."""
    steps = steps_within(config, "steps", schedule.num_timesteps)
    timesteps = spaced_timesteps(config, schedule) or SAMPLERS[config.mode].timesteps(schedule, steps)
    return min(config.images, slots) * len(timesteps)
