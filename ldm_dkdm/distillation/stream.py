"""The stream of training batches: one teacher call each, never two (DKDM, Alg. 1 and Sec. 3.3)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.batches import BatchStream
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import DistillBatch, NoisyBatch
from ldm_dkdm.rng import numpy_generator, torch_generator


def draw_all(pool: NoisyPool, batch_size: int, rng: np.random.Generator) -> Tensor:
    """Every slot, every time: the batch stays together (iterative and shuffled iterative distillation)."""
    return torch.arange(len(pool))


def draw_some(pool: NoisyPool, batch_size: int, rng: np.random.Generator) -> Tensor:
    """Distinct slots of a larger pool, uniformly at random (dynamic iterative distillation)."""
    return pool.draw(batch_size, rng)


@dataclass(frozen=True)
class Variant:
    """One of the paper's three ways to make batches (Sec. 3.3)."""

    draw: Callable[[NoisyPool, int, np.random.Generator], Tensor]
    expands: bool = False  # the pool has round(rho * T) batches instead of one
    from_noise: bool = False  # all slots begin at T


VARIANTS = {
    "iterative": Variant(draw_all, from_noise=True),
    "shuffled": Variant(draw_all),
    "dynamic": Variant(draw_some, expands=True),
}


class DistillStream(BatchStream):
    """Draws slots, lets the teacher predict and step them, and hands over the prediction.

    Args:
        teacher: the teacher, on `device`.
        pool: a filled pool.
        config: batch size, variant and stride; `discard`, the probability that an advanced batch is not handed
            over (Sec. 11), after which `discard_mode` draws others or walks the same slots on; `input_perturbation`,
            gamma: the student sees x_t + gamma sqrt(1 - abar_t) noise (Ning et al. 2023), with the prediction at x_t
            as target; L'_vlb takes both means at what the student sees.
        max_steps: batches of the whole training.
        seed, rank: with the step, they decide every random choice.
        device: where the student trains.
        first_step: batches already handed over.
    """

    def __init__(
        self,
        teacher: DiffusionModel,
        pool: NoisyPool,
        config: DistillConfig,
        max_steps: int,
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str = "cpu",
        first_step: int = 0,
    ) -> None:
        self.teacher, self.pool, self.config = teacher, pool, config
        self.max_steps, self.step = max_steps, first_step
        self.seed, self.rank, self.device = seed, rank, device
        self.draw = VARIANTS[config.variant].draw
        self.speed = speed_of(config, teacher.schedule)

    def next_batch(self) -> DistillBatch:
        """Advance batches until one is not discarded; the pool is up to date when it is handed over."""
        rng = numpy_generator(self.seed, self.rank, self.step, "draw")
        generator = torch_generator(self.seed, self.rank, self.step, "step_noise", self.device)
        indices = self.draw(self.pool, self.config.batch_size, rng)
        while True:
            batch = self._advance(indices, rng, generator)
            if rng.random() >= self.config.discard:
                break
            if self.config.discard_mode == "redraw":
                indices = self.draw(self.pool, self.config.batch_size, rng)
        self.step += 1
        return self._perturbed(batch, generator) if self.config.input_perturbation else batch

    def _advance(self, indices: Tensor, rng: np.random.Generator, generator: torch.Generator) -> DistillBatch:
        """Predict and step the slots, put them back: ONE teacher call."""
        slots = self.pool.take(indices).to(self.device)
        stride = self._strides(slots.t, rng)
        target, x_next = self.teacher.step(slots, self._randn(slots.x, generator), stride)
        t_next = slots.t - stride
        finished = t_next < 0
        fresh_x, fresh_t = self._restarts(target.x_0, rng, generator)
        x_next = torch.where(finished.view(-1, 1, 1, 1), fresh_x, x_next)
        t_next = torch.where(finished, fresh_t, t_next)
        label = slots.label
        if label is not None:
            fresh = self.teacher.draw_labels(len(label), generator)
            assert fresh is not None  # labelled slots come from a class-conditional teacher
            label = torch.where(finished, fresh, label)
        self.pool.put_back(indices, NoisyBatch(x_next, t_next, label))
        return DistillBatch(slots.x, slots.t, target, slots.label)

    def _strides(self, t: Tensor, rng: np.random.Generator) -> int | Tensor:
        """How far each slot (B,) advances: `stride` on average, and further where the wanted density of t is lower.

        Slots that pass a timestep at a speed v stay there 1 / v of the time, so that the density is kept.
        """
        if self.speed is None:
            return 1
        exact = self.speed.to(t.device)[t]
        chance = torch.from_numpy(rng.random(len(t))).to(t.device)
        return (exact + chance).floor().long()

    def _restarts(self, x_0: Tensor, rng: np.random.Generator, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where finished slots begin again, states (B,C,H,W) and timesteps (B,): at T, from fresh noise.

        With longer steps they begin anywhere in the first one, so that no timestep is visited more often than others:
        the sample x_0 that has just ended is noised to there.
        """
        last = self.teacher.schedule.num_timesteps - 1
        noise = self._randn(x_0, generator)
        if self.speed is None:
            return noise, torch.full((len(x_0),), last, device=x_0.device)
        first_step = max(1, round(self.speed[last].item()))
        t = torch.full((len(x_0),), last - int(rng.integers(first_step)), device=x_0.device)
        return torch.where((t == last).view(-1, 1, 1, 1), noise, q_sample(self.teacher.schedule, x_0, t, noise)), t

    def _perturbed(self, batch: DistillBatch, generator: torch.Generator) -> DistillBatch:
        noise = q_sample(self.teacher.schedule, torch.zeros_like(batch.x), batch.t, self._randn(batch.x, generator))
        return DistillBatch(batch.x + self.config.input_perturbation * noise, batch.t, batch.target, batch.label)

    def _randn(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device)


def speed_of(config: DistillConfig, schedule: NoiseSchedule) -> Tensor | None:
    """Timesteps (T,) that a slot advances at each t, on average, float64; None: always one, as in the paper."""
    cap = config.warmup.t_cap
    if config.stride == 1 and cap is None:
        return None
    return config.stride / schedule.density(cap)
