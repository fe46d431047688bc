"""Log means of the losses over windows of steps, and the latest measurements beside them."""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm_dkdm.evaluation.agreement import FIGURES
from ldm_dkdm.training.ends import StepCallback, figures_of
from ldm_dkdm.training.hosts import mean_of_hosts


class Windows(StepCallback):
    """Gives the loggers a row every `every` steps, and at the last step of the run.

    A row has the means over its steps of what the module logs, the training seconds summed over resumes, the steps a
    second and the last step's learning rate. A measurement shares the row of its step, or has one of its own.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.seconds, self._since = 0.0, 0.0
        self.started = 0.0  # seconds at the window's start
        self.totals: dict[str, float | Tensor] = {}  # sums in the current window
        self.counts: dict[str, int] = {}  # batches in these sums
        self.steps = 0  # steps in the current window
        self.learning_rate = 0.0
        self.figures: dict[str, float] = {}  # measured in this step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._since = time.monotonic() - self.seconds

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        for name, value in figures_of(module).items():
            if name not in FIGURES:
                self.totals[name] = self.totals.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
        super().on_train_batch_end(trainer, module, *args)

    def measured(self, trainer: L.Trainer, figures: Mapping[str, float]) -> None:
        """Take figures into this step's row."""
        self.figures |= figures

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps += 1
        self.seconds = time.monotonic() - self._since
        step, row = trainer.global_step, {"seconds": self.seconds}
        if step % self.every == 0 or step >= trainer.max_steps:
            row |= self._means(trainer)
        if (len(row) > 1 or self.figures) and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({**row, **self.figures}, step)
        self.figures = {}

    def before_save(self, trainer: L.Trainer) -> None:
        """Take the means of all ranks' sums: then the window's row is the same after a resume."""
        if trainer.world_size > 1:
            sums = mean_of_hosts(trainer, [float(total) for total in self.totals.values()])
            self.totals = dict(zip(self.totals, sums, strict=True))

    def _means(self, trainer: L.Trainer) -> dict[str, float]:
        """The figures of a window, which ends here."""
        means = mean_of_hosts(trainer, [float(total) / self.counts[name] for name, total in self.totals.items()])
        row = {"steps_per_second": self.steps / max(1e-9, self.seconds - self.started)}
        row |= dict(zip(self.totals, means, strict=True))
        row["learning_rate"] = self.learning_rate
        self.totals, self.counts, self.steps, self.started = {}, {}, 0, self.seconds
        return row

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        totals = {name: float(total) for name, total in self.totals.items()}
        times = {"seconds": self.seconds, "started": self.started}
        return {**times, "totals": totals, "counts": dict(self.counts), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window."""
        for name in ("seconds", "started", "totals", "counts", "steps"):
            setattr(self, name, state_dict[name])
