"""Fill the pool: every slot gets a state of the teacher's chain at its first t."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import DistillConfig, WarmupConfig
from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.samplers import SAMPLERS, last
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.diffusion.timesteps import log_snr_timesteps
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import VARIANTS
from ldm_dkdm.errors import pick
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import NoisyBatch, Prediction
from ldm_dkdm.rng import numpy_generator, torch_generator

NOISED = 1024  # states noised at once: few samples can fill many slots


@dataclass(frozen=True)
class Warmup:
    """Fills a pool batch by batch.

    Attributes:
        pool: the pool to fill.
        teacher: on `device`.
        config: the mode and its settings.
        seed, rank: they decide every random choice.
        device: where the teacher computes.
        check: called before every teacher call; what it raises ends the warm-up at the last whole batch.
    """

    pool: NoisyPool
    teacher: DiffusionModel
    config: WarmupConfig
    seed: int = 0
    rank: int = 0
    device: torch.device | str = "cpu"
    check: Callable[[], None] = lambda: None

    def run(self) -> Iterator[int]:
        """Fill the slots that are still empty; yields the number of filled slots after every batch.

        A batch follows from (seed, rank, first slot), so an interrupted warm-up continues exactly.
        """
        mode = pick(WARMUPS, self.config.mode, "mode")
        while self.pool.filled < len(self.pool):
            generator = torch_generator(self.seed, self.rank, self.pool.filled, "warmup", self.device)
            self.pool.fill(mode.fill(self, generator))
            yield self.pool.filled

    def ancestral(self, generator: torch.Generator) -> NoisyBatch:
        """Walk fresh noise from T down to each slot's own t, one reverse step a call; finished slots wait."""
        steps, first = self.teacher.schedule.num_timesteps, self.pool.filled
        # The slots' random t are sorted: the slots of a batch stop at nearly the same t, so few calls are
        # spent on slots that have arrived. Draws are uniform over the slots, so their order does not matter.
        targets = numpy_generator(self.seed, self.rank, 0, "warmup").integers(0, steps, len(self.pool))
        target = torch.from_numpy(targets).sort().values[first : first + self.config.batch_size].to(self.device)
        x, label = self._randn(len(target), generator), self.teacher.draw_labels(len(target), generator)
        for step in range(steps - 1, int(target.min()), -1):
            self.check()
            t = torch.full_like(target, step)
            moved = self.teacher.step(NoisyBatch(x, t, label), self._randn(len(x), generator))[1]
            x = torch.where((t > target).view(-1, 1, 1, 1), moved, x)
        return NoisyBatch(x, target, label)

    def samples(self, generator: torch.Generator) -> NoisyBatch:
        """Noise each sample of the teacher to several random t: sample i fills the slots of its share.

        The mode names a sampler that needs no noise of its own.
        """
        images, schedule = min(self.config.images, len(self.pool)), self.teacher.schedule
        starts = torch.arange(images + 1) * len(self.pool) // images
        first = int(torch.searchsorted(starts, self.pool.filled))
        copies = starts.diff()[first : first + self.config.batch_size].to(self.device)
        noise, label = self._randn(len(copies), generator), self.teacher.draw_labels(len(copies), generator)

        def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
            self.check()
            return self.teacher.predict(x, t, label)

        steps = steps_within(self.config, "steps", schedule.num_timesteps)
        walk, timesteps = SAMPLERS[self.config.mode].walk, spaced_timesteps(self.config, schedule)
        spaced = {} if timesteps is None else {"timesteps": timesteps}
        chain = walk(schedule, denoise, noise, lambda: noise, steps, label, **spaced)
        x_0, owner = last(chain), torch.arange(len(copies), device=self.device).repeat_interleave(copies)
        quantiles = torch.rand(len(owner), generator=generator, device=generator.device)
        t = schedule.timesteps_at(quantiles, self.config.t_cap)
        x = torch.empty((len(owner), *x_0.shape[1:]), dtype=self.pool.x.dtype)
        for part in torch.arange(len(owner), device=self.device).split(NOISED):
            noise = self._randn(len(part), generator)
            x[part.cpu()] = q_sample(schedule, x_0[owner[part]], t[part], noise).to("cpu", x.dtype)
        return NoisyBatch(x, t, None if label is None else label[owner])

    def noise(self, generator: torch.Generator) -> NoisyBatch:
        """Fresh noise at T: nothing to prepare."""
        count = min(self.config.batch_size, len(self.pool) - self.pool.filled)
        t = torch.full((count,), self.teacher.schedule.num_timesteps - 1, device=self.device)
        return NoisyBatch(self._randn(count, generator), t, self.teacher.draw_labels(count, generator))

    def _randn(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn((count, *self.pool.x.shape[1:]), generator=generator, device=generator.device)


@dataclass(frozen=True)
class Mode:
    """A way to fill the pool.

    Attributes:
        fill: (warm-up, generator) -> the next states.
        calls: (config, slots, schedule) -> expected number of single-sample teacher evaluations.
        from_samples: it noises samples of the teacher, so that `steps`, `images` and `t_cap` have an effect.
    """

    fill: Callable[[Warmup, torch.Generator], NoisyBatch]
    calls: Callable[[WarmupConfig, int, NoiseSchedule], int]
    from_samples: bool = False


def spaced_timesteps(config: WarmupConfig, schedule: NoiseSchedule) -> list[int] | None:
    """The timesteps of the samples, even in log-SNR; None: the sampler chooses its own."""
    steps = steps_within(config, "steps", schedule.num_timesteps)
    return log_snr_timesteps(schedule, steps) if SAMPLERS[config.mode].takes_timesteps else None


def _sampling_calls(config: WarmupConfig, slots: int, schedule: NoiseSchedule) -> int:
    steps = steps_within(config, "steps", schedule.num_timesteps)
    return min(config.images, slots) * len(
        spaced_timesteps(config, schedule) or SAMPLERS[config.mode].timesteps(schedule, steps)
    )


WARMUPS = {
    "ancestral": Mode(Warmup.ancestral, lambda config, slots, schedule: slots * (schedule.num_timesteps - 1) // 2),
    "ddim": Mode(Warmup.samples, _sampling_calls, from_samples=True),
    "dpm-solver++": Mode(Warmup.samples, _sampling_calls, from_samples=True),
    "noise": Mode(Warmup.noise, lambda config, slots, schedule: 0),
}


def preparation(config: DistillConfig) -> WarmupConfig:
    """The warm-up that a variant needs: iterative distillation begins with noise."""
    return replace(config.warmup, mode="noise") if VARIANTS[config.variant].from_noise else config.warmup


def warmup_of(config: DistillConfig, ranks: int) -> WarmupConfig:
    """The warm-up of one rank: its share of the teacher's samples, which all ranks draw together."""
    mode = preparation(config)
    return replace(mode, images=-(-mode.images // ranks)) if WARMUPS[mode.mode].from_samples else mode


def warmup_calls(config: WarmupConfig, slots: int, schedule: NoiseSchedule) -> int:
    """Teacher evaluations (of one sample) that a warm-up needs; for `ancestral` the expected number."""
    return WARMUPS[config.mode].calls(config, slots, schedule)
