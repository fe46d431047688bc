"""Check that teacher, student and configuration of a distillation fit together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import DistillConfig, DistillRun
from ldm_dkdm.distillation.chains import require_states
from ldm_dkdm.distillation.make_student import (
    check_loss,
    name_lone_channels,
    require_call,
    require_fit,
    require_fixed_variance,
    require_variance,
)
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.distillation.pool import NoisyPool, pool_slots, slot_bytes
from ldm_dkdm.distillation.replay import kept_bytes
from ldm_dkdm.distillation.stream import VARIANTS
from ldm_dkdm.distillation.warmup import WARMUPS, preparation
from ldm_dkdm.errors import UserError
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.training.warmup_shares import PoolWarmup


@dataclass(frozen=True)
class Distillation:
    """Teacher, student and configuration of one run, which fit together.

    Attributes:
        teacher, student: on the same states.
        config: the whole configuration.
        slots: size of one rank's pool, by the configuration.
        done: steps that an earlier part of the run has made, for the plan of what is left.
        spent: seconds of training in them that `trainer.max_minutes` counts.
        warmups: those of a run without a checkpoint that it makes or goes on with; none, before the disk was read.
        kept: slots that all pools have together, where they are those of a run that goes on.
    """

    teacher: DiffusionModel
    student: DiffusionModel
    config: DistillRun
    slots: int
    done: int = 0
    spent: float = 0.0
    warmups: Sequence[PoolWarmup] = ()
    kept: int | None = None

    @property
    def labeled(self) -> bool:
        """Whether slots keep a class label."""
        return self.teacher.num_classes is not None

    @property
    def pool_dtype(self) -> torch.dtype:
        """Number format of the pool's states."""
        return getattr(torch, self.config.distill.pool_dtype)

    @property
    def all_slots(self) -> int:
        """Slots of all ranks' pools together: pools that are dealt to another number of ranks keep theirs."""
        return self.config.trainer.ranks * self.slots if self.kept is None else self.kept

    @property
    def own_slots(self) -> int:
        """Slots of one rank's pool, the largest one."""
        return -(-self.all_slots // self.config.trainer.ranks)

    @property
    def pool_bytes(self) -> int:
        """Bytes of one rank's pool."""
        return self.own_slots * self.slot_bytes

    @property
    def all_pool_bytes(self) -> int:
        """Bytes of all ranks' pools."""
        return self.all_slots * self.slot_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of the pool."""
        return slot_bytes(self.teacher.shape, self.pool_dtype, self.labeled)

    @property
    def replay_bytes(self) -> int:
        """Bytes of the predictions that one rank keeps for a replay."""
        learned = getattr(self.teacher.network, "out_channels", 0) == 2 * self.teacher.shape[0]
        return kept_bytes(self.config.distill, self.teacher.shape, learned)

    @property
    def batches(self) -> int:
        """Number of batches that the student sees in the whole run."""
        return self.config.trainer.max_steps * self.config.trainer.accumulate

    def module(self) -> StudentModule:
        """The student in training."""
        return StudentModule(self.student, self.config.distill.loss, self.config.trainer)

    def new_pool(self, folder: Path, rank: int, device: torch.device, slots: int | None = None) -> NoisyPool:
        """An empty pool of one rank, whose student trains on `device`.

        A share of other ranks' pools may have another number of slots.
        """
        slots = slots or self.own_slots
        place = self.pool_place(device, slots)
        storage = folder / f"pool-rank{rank}.bin" if place == "mmap" else None
        own = device if place == "device" else torch.device("cpu")
        return NoisyPool(slots, self.teacher.shape, self.pool_dtype, storage, self.labeled, own)

    def pool_place(self, device: torch.device, slots: int | None = None) -> str:
        """Where a rank's pool, of another number of slots if given, is kept: `device`, `memory` or `mmap`."""
        chosen = self.config.distill.pool_storage
        if chosen != "auto":
            return chosen
        needed = 2 * ((slots or self.own_slots) * self.slot_bytes + self.replay_bytes)
        fits = device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0]
        return "device" if fits else "memory"


def assemble(
    teacher: DiffusionModel, student: DiffusionModel, config: DistillRun, resumed: bool = False
) -> Distillation:
    """Check every part and number of a distillation; nothing is written.

    A resumed run may have keys of a variance that its student lacks: older versions ignored them.

    Raises:
        UserError: the first thing that does not fit.
    """
    method, steps = config.distill, teacher.schedule.num_timesteps
    mode = preparation(method).mode
    sampling = WARMUPS[mode].from_samples
    if not sampling and method.warmup.t_cap is not None:
        modes = " or ".join(name for name, known in WARMUPS.items() if known.from_samples)
        own = f"mode: {mode}" if mode == method.warmup.mode else f"variant: {method.variant}, which has no warm-up"
        raise UserError(f"warmup.t_cap: has an effect with mode: {modes} only, and this run has {own}; set it to null")
    _require_draws(method)
    require_fit(student, teacher, begun=resumed)
    name_lone_channels(student, teacher)
    learned = require_call(student)
    if not learned and not resumed:
        require_variance(method.loss)
    if learned and not resumed:
        require_fixed_variance(config.diffusion)
    check_loss(method.loss, teacher.schedule)
    if method.stride > steps:
        raise UserError(f"stride: {method.stride} is more than the {steps} diffusion steps")
    steps_within(config.logging, "sample_steps", steps)
    slots = _slots(method, steps)
    try:
        if sampling:
            steps_within(method.warmup, "steps", steps)
        elif WARMUPS[mode].counts_images and method.pool_from is None:
            require_states(method.warmup.images, slots, steps, config.trainer.ranks)
    except UserError as error:
        raise UserError(f"warmup.{error}") from error
    return Distillation(teacher, student, config, slots)


def _require_draws(config: DistillConfig) -> None:
    """Refuse keys of batches that are drawn, where they stay together as the paper compares them."""
    if VARIANTS[config.variant].draw is None:
        return
    drawing = " or ".join(name for name, variant in VARIANTS.items() if variant.draw is None)
    for key, off in (("draws", "uniform"), ("replay", 1)):
        if getattr(config, key) != off:
            raise UserError(
                f"{key}: has an effect with variant: {drawing} only, and this run has {config.variant}; set it to {off}"
            )


def _slots(config: DistillConfig, num_timesteps: int) -> int:
    if not VARIANTS[config.variant].expands:
        return config.batch_size
    if config.rho is None:
        raise UserError("rho: missing; dynamic distillation needs the size of its pool, the paper's is 0.4 or 4")
    slots = pool_slots(config.rho, num_timesteps, config.batch_size)
    if slots < config.batch_size:
        raise UserError(
            f"rho: {config.rho} makes a pool of {slots} slots, fewer than a batch of {config.batch_size}; raise rho"
        )
    return slots
