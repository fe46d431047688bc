"""Filling the pool: every slot gets a state of the teacher's chain at a random t."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.samplers import ddim, ddim_timesteps, last
from ldm_dkdm.distill.pool import NoisyPool
from ldm_dkdm.records import NoisyBatch, Prediction
from ldm_dkdm.rng import numpy_generator, torch_generator
from ldm_dkdm.schema import WarmupConfig
from ldm_dkdm.teacher import Teacher


def warm_up(
    pool: NoisyPool,
    teacher: Teacher,
    config: WarmupConfig,
    seed: int,
    rank: int,
    device: torch.device | str,
    check: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Fill the slots that are still empty; yields the number of filled slots after every batch.

    A batch follows from (seed, rank, first slot), so an interrupted warm-up goes on exactly.

    Args:
        pool: where the states go.
        teacher: on `device`.
        config: the mode and its cost.
        seed, rank: of every random choice.
        device: where the teacher computes.
        check: called before every teacher call; what it raises ends the warm-up at the last whole batch.
    """
    fill = _ancestral if config.mode == "ancestral" else _ddim
    while pool.filled < len(pool):
        generator = torch_generator(seed, rank, pool.filled, "warmup", device)
        pool.fill(*fill(pool, teacher, config, seed, rank, generator, check))
        yield pool.filled


def warmup_calls(config: WarmupConfig, slots: int, num_timesteps: int) -> int:
    """Teacher evaluations (of one sample) that a warm-up needs; for `ancestral` the expected number."""
    if config.mode == "ancestral":
        return slots * (num_timesteps - 1) // 2
    return min(config.images, slots) * len(ddim_timesteps(num_timesteps, config.steps))


def _ancestral(
    pool: NoisyPool,
    teacher: Teacher,
    config: WarmupConfig,
    seed: int,
    rank: int,
    generator: torch.Generator,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Walk fresh noise from T down to each slot's own t, one reverse step a call; finished slots wait."""
    steps = teacher.schedule.num_timesteps
    # The slots' random t, sorted: the slots of a batch stop at nearly the same t, so hardly a call is
    # spent on a slot that has arrived. Draws are uniform over the slots, so their order does not matter.
    targets = torch.from_numpy(numpy_generator(seed, rank, 0, "warmup").integers(0, steps, len(pool))).sort().values
    target = targets[pool.filled : pool.filled + config.batch_size].to(generator.device)
    x = _noise((len(target), *pool.x.shape[1:]), generator)
    for step in range(steps - 1, int(target.min()), -1):
        check()
        t = torch.full_like(target, step)
        moved = teacher.step(NoisyBatch(x, t), _noise(x.shape, generator))[1]
        x = torch.where((t > target).view(-1, 1, 1, 1), moved, x)
    return x, target


def _ddim(
    pool: NoisyPool,
    teacher: Teacher,
    config: WarmupConfig,
    seed: int,
    rank: int,
    generator: torch.Generator,
    check: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Noise each DDIM sample of the teacher to several random t: sample i fills the slots of its share."""
    images = min(config.images, len(pool))
    starts = torch.arange(images + 1) * len(pool) // images
    first = int(torch.searchsorted(starts, pool.filled))
    copies = starts.diff()[first : first + config.batch_size].to(generator.device)
    noise = _noise((len(copies), *pool.x.shape[1:]), generator)

    def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        check()
        return teacher.predict(x, t, label)

    samples = last(ddim(teacher.schedule, denoise, noise, lambda: noise, config.steps))
    x_0 = samples.repeat_interleave(copies, 0)
    quantiles = torch.rand(len(x_0), generator=generator, device=generator.device)
    t = teacher.schedule.timesteps_at(quantiles, config.t_cap)
    return q_sample(teacher.schedule, x_0, t, _noise(x_0.shape, generator)), t


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
