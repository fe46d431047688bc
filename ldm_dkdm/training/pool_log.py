"""Log the state of rank 0's pool: which timesteps its slots are at, and how old they are."""

from pathlib import Path

import lightning as L
import numpy as np
import torch

from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.training.ends import StepCallback
from ldm_dkdm.training.tables import Table

BINS = 20  # equal parts of [0, T)
COUNTS = tuple(f"t_{i:02d}" for i in range(BINS))
AGES = ("age_mean", "age_p50", "age_p90", "age_max")


class PoolLog(StepCallback):
    """Writes a row to pool.csv every few steps: slots in each bin of t, and the age of slots.

    Args:
        file: logs/<run>/pool.csv.
        every: steps between rows; the last step has one too.
        num_timesteps: T.
        resumed_at: step that the run continues from.
    """

    def __init__(self, file: Path, every: int, num_timesteps: int, resumed_at: int) -> None:
        self.table = Table(file, ("step", *COUNTS, *AGES), resumed_at)
        self.every, self.num_timesteps = every, num_timesteps
        self.pool: NoisyPool | None = None  # set once the rank is known

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step >= trainer.max_steps
        if due and trainer.is_global_zero and self.pool is not None:
            batches = trainer.accumulate_grad_batches
            self.table.add({"step": step, **pool_figures(self.pool, self.num_timesteps, step, batches)})


def pool_figures(pool: NoisyPool, num_timesteps: int, step: int, batches: int = 1) -> dict[str, float]:
    """The histogram of t, in slots, and the slots' age: steps since they were last put back.

    Args:
        pool: as it is after `step` steps.
        num_timesteps: T.
        step: number of finished steps. batches: batches in a step.
    """
    counts = torch.bincount(pool.t.long() * BINS // num_timesteps, minlength=BINS)
    age = (step * batches - pool.updated).double() / batches
    ages = [age.mean().item(), *np.quantile(age.numpy(), (0.5, 0.9, 1.0)).tolist()]
    return dict(zip((*COUNTS, *AGES), [*counts.tolist(), *ages], strict=True))
