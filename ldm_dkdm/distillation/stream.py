"""The stream of training batches: one teacher call each, never two (DKDM, Alg. 1 and Sec. 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.device import to_device
from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.distillation.batches import BatchStream
from ldm_dkdm.distillation.draws import DRAWS, Draw
from ldm_dkdm.distillation.pace import pace_of
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.staging import slots_on
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import DistillBatch, NoisyBatch
from ldm_dkdm.rng import numpy_generator, torch_generator


def draw_all(pool: NoisyPool, batch_size: int, rng: np.random.Generator) -> Tensor:
    """Every slot, every time: the batch stays together (iterative and shuffled iterative distillation)."""
    return torch.arange(len(pool), device="cpu")


@dataclass(frozen=True)
class Variant:
    """One of the paper's three ways to make batches (Sec. 3.3)."""

    draw: Draw | None  # None: as `draws` says
    expands: bool = False  # the pool has round(rho * T) batches instead of one
    from_noise: bool = False  # all slots begin at T


VARIANTS = {
    "iterative": Variant(draw_all, from_noise=True),
    "shuffled": Variant(draw_all),
    "dynamic": Variant(None, expands=True),
}


@dataclass(frozen=True)
class Plan:
    """What the host decides about one advance, ahead of the device.

    Attributes:
        indices: the slots (B,) to advance.
        places: uniform numbers (2,B), float64, for a `Pace`; None without one.
        kept: whether the advanced batch is handed over.
    """

    indices: Tensor
    places: Tensor | None
    kept: bool


class DistillStream(BatchStream):
    """Draws slots, lets the teacher predict and step them, and hands over the prediction.

    The host never waits for the device: draws and timesteps are decided on the host, one advance ahead, and states
    stay on the device or travel beside its work (`staging`).

    Args:
        teacher: the teacher, on `device`.
        pool: a filled pool.
        config: batch size, variant, draws and stride; `discard`, the probability that an advanced batch is not handed
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
        self.draw = VARIANTS[config.variant].draw or DRAWS[config.draws]
        self.pace = pace_of(config, teacher.schedule)
        self.together = VARIANTS[config.variant].from_noise  # all slots stay at one t
        self.slots = slots_on(pool, torch.device(device))
        self.plans = self._plans(first_step)
        self.plan: Plan | None = None  # the next advance

    def next_batch(self) -> DistillBatch:
        """Advance batches until one is not discarded; the pool's timesteps are up to date when it is handed over.

        Its states are once `pool.settle` has been called.
        """
        generator = torch_generator(self.seed, self.rank, self.step, "step_noise", self.device)
        kept = False
        while not kept:
            plan = self.plan or next(self.plans)
            batch = self._advance(plan, generator)
            self.plan = next(self.plans)
            self.slots.expect(self.plan.indices)
            kept = plan.kept
        self.step += 1
        return self._perturbed(batch, generator) if self.config.input_perturbation else batch

    def _plans(self, step: int) -> Iterator[Plan]:
        """The advances of this step and of all after it; they follow from (seed, rank, step)."""
        size, redraws = self.config.batch_size, self.config.discard_mode == "redraw"
        while True:
            rng, kept = numpy_generator(self.seed, self.rank, step, "draw"), False
            indices = self.draw(self.pool, size, rng)
            while not kept:
                places = None if self.pace is None else torch.from_numpy(rng.random((2, len(indices))))
                kept = bool(rng.random() >= self.config.discard)
                yield Plan(indices, places, kept)
                if not kept and redraws:
                    indices = self.draw(self.pool, size, rng)
            step = self._after(step)

    def _after(self, step: int) -> int:
        """The step whose advance comes after that of `step`."""
        return step + 1

    def _advance(self, plan: Plan, generator: torch.Generator) -> DistillBatch:
        """Predict and step the slots, put them back: ONE teacher call."""
        t = self.pool.t[plan.indices].long()
        t_next, fresh_t = self._moves(t, plan.places)  # float64 arithmetic of the host
        self.pool.move(plan.indices, torch.where(t_next < 0, fresh_t, t_next), self.step + 1)
        t, t_next, fresh_t = to_device(torch.stack([t, t_next, fresh_t]), self.device)
        x, label = self.slots.take(plan.indices)
        slots = NoisyBatch(x, t, label)
        stride = 1 if self.pace is None else t - t_next
        target, x_next = self.teacher.step(slots, self._randn(x, generator), stride)
        finished = t_next < 0
        x_next = torch.where(finished.view(-1, 1, 1, 1), self._fresh(target.x_0, fresh_t, generator), x_next)
        if label is not None:
            fresh = self.teacher.draw_labels(len(label), generator)
            assert fresh is not None  # labelled slots come from a class-conditional teacher
            in_noise = fresh_t == self.teacher.schedule.num_timesteps - 1
            label = torch.where(finished & in_noise, fresh, label)  # below T the old sample goes on
        self.slots.put_back(plan.indices, x_next, label)
        return DistillBatch(slots.x, slots.t, target, slots.label)

    def _moves(self, t: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) after this step, -1 where a chain ends, and those at which its slot then begins again."""
        if self.pace is None or places is None:
            return t - 1, torch.full_like(t, self.teacher.schedule.num_timesteps - 1)
        begins = places[1, :1].expand(len(t)) if self.together else places[1]
        return self.pace.next(t, places[0]), self.pace.first(begins)

    def _fresh(self, x_0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """States (B,C,H,W) at which slots begin again: noise at T, below it the sample that has ended, noised to t."""
        noise = self._randn(x_0, generator)
        if self.pace is None:
            return noise
        last = (t == self.teacher.schedule.num_timesteps - 1).view(-1, 1, 1, 1)
        return torch.where(last, noise, q_sample(self.teacher.schedule, x_0, t, noise))

    def _perturbed(self, batch: DistillBatch, generator: torch.Generator) -> DistillBatch:
        noise = q_sample(self.teacher.schedule, torch.zeros_like(batch.x), batch.t, self._randn(batch.x, generator))
        return DistillBatch(batch.x + self.config.input_perturbation * noise, batch.t, batch.target, batch.label)

    def _randn(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=like.device)
