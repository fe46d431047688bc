"""Time a few iterations of a training before it starts."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from ldm_dkdm.config.schema import LossConfig, TrainerConfig
from ldm_dkdm.device import autocast
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import DistillBatch
from ldm_dkdm.reporting import counted

TIMED_ITERATIONS = 3
MAX_TIMED_BATCH = 8  # batches are timed at this size or less; times are scaled
TIMING_SECONDS = 30  # about the longest that timing may take


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of an iteration: making a batch, loss and gradients, and the update of the weights."""

    batch: float
    gradients: float
    update: float

    def iteration(self, scale: float) -> float:
        """Seconds of an iteration whose batch is `scale` times the timed one; an update takes the same time."""
        return (self.batch + self.gradients) * scale + self.update


def time_iterations(
    model: DiffusionModel,
    loss: LossConfig,
    next_batch: Callable[[], DistillBatch],
    device: torch.device,
    iterations: int,
) -> Times:
    """The shortest times of `iterations` training iterations; weights change by a learning rate of 1e-9 only."""
    module = StudentModule(model, loss, TrainerConfig(max_steps=1, learning_rate=1e-9)).to(device)
    optimizer = module.configure_optimizers()["optimizer"]
    found = []
    for _ in range(iterations):
        marks = [time.perf_counter()]
        batch = next_batch()
        marks.append(_now(device))
        with autocast(model.precision, device):
            value = module.training_step(batch, 0)
        value.backward()
        marks.append(_now(device))
        optimizer.step()
        optimizer.zero_grad()
        marks.append(_now(device))
        found.append([after - before for before, after in pairwise(marks)])
    return Times(*map(min, zip(*found)))


def timed_batch(batch: int, trial_seconds: float) -> int:
    """The batch to time, at most `batch`, from the seconds that an iteration of one sample took."""
    return max(1, min(batch, MAX_TIMED_BATCH, int(TIMING_SECONDS / (TIMED_ITERATIONS * trial_seconds))))


def timed_with(batch: int) -> str:
    """How an estimate was made, for its line."""
    return f"(from {TIMED_ITERATIONS} timed iterations of {counted(batch, 'sample')})"


def _now(device: torch.device) -> float:
    """The time when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
