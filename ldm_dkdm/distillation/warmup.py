"""Fill the pool: every slot gets a state of the teacher's chain at its first t."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ldm_dkdm.config.schema import DistillConfig, WarmupConfig
from ldm_dkdm.device import to_device
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.chains import ChainBatch, Chains, expected_calls
from ldm_dkdm.distillation.noised import noised_samples, sampling_calls
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import VARIANTS
from ldm_dkdm.distillation.walk import Walk
from ldm_dkdm.errors import pick
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.rng import numpy_generator, torch_generator


@dataclass
class Warmup:
    """Fills a pool batch by batch.

    Attributes:
        pool: the pool to fill.
        teacher: on `device`.
        config: the mode and its settings.
        seed, rank: they decide every random choice.
        device: where the teacher computes.
        check: called before every teacher call; what it raises ends the warm-up there.
        under_way: where the batch of chains is that was walked last; given to another warm-up, that one goes on there.
    """

    pool: NoisyPool
    teacher: DiffusionModel
    config: WarmupConfig
    seed: int = 0
    rank: int = 0
    device: torch.device | str = "cpu"
    check: Callable[[], None] = lambda: None
    under_way: Walk | None = None

    @cached_property
    def mode(self) -> "Mode":
        """The entry of WARMUPS."""
        return pick(WARMUPS, self.config.mode, "mode")

    def run(self) -> Iterator[int]:
        """Fill the slots that are still empty; yields after every teacher call how many samples have been through it.

        A batch follows from (seed, rank, first slot), so an interrupted warm-up continues exactly: at the step of
        `under_way` if that is of the batch, else at the beginning of the batch.
        """
        done = self.done
        while self.pool.filled < len(self.pool):
            generator = torch_generator(self.seed, self.rank, self.pool.filled, "warmup", self.device)
            for samples in self.mode.fill(self, generator):
                done += samples
                yield done

    @property
    def calls(self) -> int:
        """Single-sample teacher evaluations of the whole warm-up; of chains exactly, also of those that have ended."""
        slots = len(self.pool)
        if self.mode.chains is not None:
            return self.chains.calls(self.config.batch_size, slots)
        return self.mode.calls(self.config, slots, self.teacher.schedule)

    @property
    def done(self) -> int:
        """Those that have been made for the slots that are filled, and for the chains under way."""
        if self.mode.chains is None:
            return self.calls * self.pool.filled // len(self.pool)
        walk, last = self.under_way, self.teacher.schedule.num_timesteps - 1
        walked = len(walk.x) * (last - walk.t) if walk is not None and walk.first == self.pool.filled else 0
        return self.chains.calls(self.config.batch_size, self.pool.filled) + walked

    @cached_property
    def chains(self) -> Chains:
        """The chains of a mode that walks them."""
        return chains_of(self.config, len(self.pool), self.teacher.schedule.num_timesteps, self.seed, self.rank)

    def walked(self, generator: torch.Generator) -> Iterator[int]:
        """Walk a batch of chains down from T-1, one reverse step a call; each leaves its states in the pool on its way.

        Chains that have ended walk on until all have.
        """
        first, t = self.pool.filled, self.teacher.schedule.num_timesteps - 1
        batch = self.chains.batch(first, self.config.batch_size)
        x, label = self.randn(batch.count, generator), self.teacher.draw_labels(batch.count, generator)
        walk = self.under_way
        if walk is not None and walk.first == first and walk.x.shape == x.shape and batch.lowest <= walk.t <= t:
            x, t = walk.x.to(x), walk.t
            generator.set_state(walk.noise)
        self._leave(batch, x, t, label)
        while t > batch.lowest:
            self.check()
            now = torch.full((batch.count,), t, device=self.device)
            x = self.teacher.step(NoisyBatch(x, now, label), self.randn(batch.count, generator))[1]
            t -= 1
            self._leave(batch, x, t, label)
            self.under_way = Walk(first, t, x, generator.get_state())  # after the states: it may be saved at any time
            yield batch.count
        self.pool.filled += len(batch.slots)
        self.under_way = None

    def _leave(self, batch: ChainBatch, x: Tensor, t: int, label: Tensor | None) -> None:
        """Put the states (B,C,H,W) of those slots into the pool whose t it is."""
        met = (batch.t == t).nonzero().squeeze(1)
        if len(met):
            own = to_device(batch.owner[met], x.device)
            states = NoisyBatch(x[own], batch.t[met], None if label is None else label[own])
            self.pool.put_back(batch.slots[met], states)

    def noise(self, generator: torch.Generator) -> Iterator[int]:
        """Fresh noise at T: nothing to prepare."""
        count = min(self.config.batch_size, len(self.pool) - self.pool.filled)
        t = torch.full((count,), self.teacher.schedule.num_timesteps - 1, device=self.device)
        self.pool.fill(NoisyBatch(self.randn(count, generator), t, self.teacher.draw_labels(count, generator)))
        yield 0

    def randn(self, count: int, generator: torch.Generator) -> Tensor:
        """Gaussian noise (count,C,H,W), where the teacher computes."""
        shape, device = (count, *self.pool.x.shape[1:]), generator.device
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Mode:
    """A way to fill the pool.

    Attributes:
        fill: (warm-up, generator) fills the next slots of the warm-up's pool; it yields after every teacher call how
            many samples have been through it.
        calls: (config, slots, schedule) -> expected number of single-sample teacher evaluations.
        chains: (config, slots) -> number of exact chains; None: it walks none.
        counts_images: `images` has an effect; the ranks share them.
        from_samples: it noises samples of the teacher, so that `steps` and `t_cap` have an effect too.
    """

    fill: Callable[[Warmup, torch.Generator], Iterator[int]]
    calls: Callable[[WarmupConfig, int, NoiseSchedule], int]
    chains: Callable[[WarmupConfig, int], int] | None = None
    counts_images: bool = False
    from_samples: bool = False


def _exact(chains: Callable[[WarmupConfig, int], int], counts_images: bool = False) -> Mode:
    """A mode that walks so many chains."""

    def calls(config: WarmupConfig, slots: int, schedule: NoiseSchedule) -> int:
        return expected_calls(chains(config, slots), slots, schedule.num_timesteps)

    return Mode(Warmup.walked, calls, chains, counts_images)


WARMUPS = {
    "ancestral": _exact(lambda config, slots: slots),
    "harvest": _exact(lambda config, slots: min(config.images, slots), counts_images=True),
    "ddim": Mode(noised_samples, sampling_calls, counts_images=True, from_samples=True),
    "dpm-solver++": Mode(noised_samples, sampling_calls, counts_images=True, from_samples=True),
    "noise": Mode(Warmup.noise, lambda config, slots, schedule: 0),
}


def preparation(config: DistillConfig) -> WarmupConfig:
    """The warm-up that a variant needs: iterative distillation begins with noise."""
    return replace(config.warmup, mode="noise") if VARIANTS[config.variant].from_noise else config.warmup


def warmup_of(config: DistillConfig, ranks: int) -> WarmupConfig:
    """The warm-up of one rank: its share of the teacher's samples or chains, which all ranks make together."""
    mode = preparation(config)
    return replace(mode, images=-(-mode.images // ranks)) if WARMUPS[mode.mode].counts_images else mode


def chains_of(config: WarmupConfig, slots: int, num_timesteps: int, seed: int, rank: int) -> Chains:
    """The chains of a mode that walks them, which follow from the seed and the rank."""
    chains = WARMUPS[config.mode].chains
    assert chains is not None
    return Chains.drawn(chains(config, slots), slots, num_timesteps, numpy_generator(seed, rank, 0, "warmup"))


def warmup_calls(config: WarmupConfig, slots: int, schedule: NoiseSchedule) -> int:
    """Teacher evaluations (of one sample) that a warm-up needs; of exact chains the expected number."""
    return WARMUPS[config.mode].calls(config, slots, schedule)
