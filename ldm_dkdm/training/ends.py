"""Callbacks that act after optimizer steps, and the early ends of a run."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from ldm_dkdm.config.schema import EarlyStopConfig, TrainerConfig
from ldm_dkdm.reporting import logger
from ldm_dkdm.training.ema import gather_average
from ldm_dkdm.training.hosts import mean_of_hosts

TIMED_STEPS = 5  # at a run's start, which show where its time limit ends it
AGREEMENT = "agreement"  # the figure that is not logged by the module


def figures_of(module: Any) -> dict[str, Tensor | float]:
    """What a training module reports of its last batch, and its last measurements."""
    return module.figures


class StepCallback(L.Callback):
    """Calls `on_step` after every optimizer step and not after the batches in between."""

    _seen = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.on_step(trainer, module)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What the callback does; `trainer.global_step` steps are done."""

    def before_save(self, trainer: L.Trainer) -> None:
        """What all ranks do before a checkpoint, which has the first rank's state alone."""


class EarlyEnd(StepCallback):
    """Ends a run before `trainer.max_steps`; an ended run stays so until its config is changed."""

    key = ""  # config key of the limit

    @property
    def reached(self) -> bool:
        """Whether the run has come to its end."""
        return False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if self.reached:
            trainer.should_stop = True  # before the first batch


def early_ends(config: TrainerConfig) -> list[EarlyEnd]:
    """The early ends that a config sets."""
    ends: list[EarlyEnd] = [TimeLimit(config.max_minutes)] if config.max_minutes else []
    return ends + ([EarlyStop(config.early_stop)] if config.early_stop else [])


def ends_of(config: TrainerConfig, states: Mapping[str, Any]) -> list[EarlyEnd]:
    """The early ends that a config sets, with the states of a checkpoint's callbacks."""
    ends = early_ends(config)
    for end in ends:
        if end.state_key in states:
            end.load_state_dict(states[end.state_key])
    return ends


def ended_early(minutes: float, reached: int, max_steps: int) -> str:
    """What max_minutes does to a run that is too slow for its steps."""
    return f"trainer.max_minutes ({minutes:g}) ends the training at about step {reached:,} of {max_steps:,}"


class TimeLimit(EarlyEnd):
    """Ends a run when its training time, summed over resumes, reaches a limit.

    `module.time_used` is the used share of the limit; the learning rate falls with it, since its schedule should fit
    the budget (Li et al. 2020, "Budgeted Training"). A line says early that the limit shortens the run.
    """

    key = "trainer.max_minutes"

    def __init__(self, minutes: float) -> None:
        self.limit = 60 * minutes
        self.spent, self._since = 0.0, 0.0
        self._timed: list[tuple[int, float]] = []  # step and time spent at it, of the first steps

    @property
    def reached(self) -> bool:
        """Whether the run has come to its end; a larger limit takes it back."""
        return self.spent >= self.limit

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since = time.monotonic() - self.spent
        self._share_time(module)
        super().on_train_start(trainer, module)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        (self.spent,) = mean_of_hosts(trainer, [time.monotonic() - self._since])  # the same in all processes
        self._share_time(module)
        if len(self._timed) < TIMED_STEPS:
            self._time(trainer.global_step, trainer.max_steps)
        if self.reached:
            steps = f"step {trainer.global_step} of {trainer.max_steps}"
            logger.info(f"stopped by trainer.max_minutes ({self.limit / 60:g}) at {steps}")
            trainer.should_stop = True

    def _time(self, step: int, max_steps: int) -> None:
        """Time one of the first steps; after the last of them, say so if the limit shortens the run."""
        self._timed.append((step, self.spent))
        if len(self._timed) < TIMED_STEPS:
            return
        first, before = self._timed[1]  # the first step is slower than others
        left = (self.limit - self.spent) * (step - first) / max(1e-9, self.spent - before)
        if 0 < left < max_steps - step:
            logger.info(ended_early(self.limit / 60, step + int(left), max_steps))

    def _share_time(self, module: Any) -> None:
        """Set a `StudentModule`'s used share of the limit."""
        module.time_used = self.spent / self.limit

    def state_dict(self) -> dict[str, float]:
        """What a resume needs."""
        return {"spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the time."""
        self.spent = state_dict["spent"]


class EarlyStop(EarlyEnd):
    """Stops when the monitored figure's mean over a window has not fallen for `patience` windows.

    Figures of the agreement are not averaged: a window is one measurement, which `measured` takes. Where the run ends
    within a window, its steps are judged for the export if they are half a window or more; the window stays open, so
    that a resume to more steps counts the same windows. Lightning's EarlyStopping acts at the ends of epochs and
    validations, which a stream does not have.
    """

    key = "trainer.early_stop.patience"

    def __init__(self, config: EarlyStopConfig) -> None:
        self.config = config
        self.on_best: Callable[[L.Trainer], None] | None = None  # called on rank 0 after a best window
        self.lowest = math.inf  # lowest mean of a window, whose weights are exported
        self.best, self.bad_windows = math.inf, 0  # last fall of more than `min_delta`, and the windows since then
        self.total: float | Tensor = 0.0  # sum in the current window
        self.batches, self.steps = 0, 0  # counts in the current window

    @property
    def reached(self) -> bool:
        """Whether the run has come to its end; a larger limit takes it back."""
        return self.bad_windows >= self.config.patience

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        if not self.config.measured:
            self.total = self.total + figures_of(module)[self.config.monitor]
            self.batches += 1
        super().on_train_batch_end(trainer, module, *args)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps += 1
        if not self.config.measured:
            if self.steps >= self.config.window:
                self._end_window(trainer, self._mean(trainer))
            elif trainer.global_step >= trainer.max_steps or _at_a_limit(trainer):
                self._end_within_window(trainer)
        if self.reached:
            logger.info(f"early stop at step {trainer.global_step}: {self._no_fall}")
            trainer.should_stop = True

    @property
    def _no_fall(self) -> str:
        config = self.config
        windows = f"{self.bad_windows} {'measurement' if config.measured else 'window'}{'s' * (self.bad_windows > 1)}"
        by = f"by more than {config.min_delta:g} " if config.min_delta else ""
        return f"{config.monitor} has not fallen {by}below {self.best:.6g} in {windows}"

    def _mean(self, trainer: L.Trainer) -> float:
        """The figure's mean over the current window and all devices."""
        (mean,) = mean_of_hosts(trainer, [float(self.total) / self.batches])
        return mean

    def before_save(self, trainer: L.Trainer) -> None:
        """Take the mean of all ranks' sums: then the window's mean is the same after a resume."""
        if trainer.world_size > 1:
            (self.total,) = mean_of_hosts(trainer, [float(self.total)])

    def measured(self, trainer: L.Trainer, figures: Mapping[str, float]) -> None:
        """Judge a measurement, if its figure is monitored; it must come before this callback's `on_step`."""
        if self.config.measured:
            self._end_window(trainer, figures[self.config.monitor])

    def _end_window(self, trainer: L.Trainer, mean: float) -> None:
        if self._judge(mean):  # the same in all processes
            self._export(trainer)

    def _end_within_window(self, trainer: L.Trainer) -> None:
        """Export the last weights if the steps since the last window are enough to judge, and have a lower mean."""
        if not self.has_best or self.on_best is None:
            return  # the save at the end exports, or the saves that keep the best
        if 2 * self.steps < self.config.window:
            logger.info(
                f"trainer.early_stop.window ({self.config.window}): the steps after the last whole window "
                f"({self.steps}) are fewer than half a window and are not judged; the model is that of the best window"
            )
        elif self._mean(trainer) < self.lowest:
            self._export(trainer)

    def _export(self, trainer: L.Trainer) -> None:
        gather_average(trainer)
        if trainer.is_global_zero and self.on_best is not None:
            self.on_best(trainer)

    @property
    def has_best(self) -> bool:
        """Whether a window has ended."""
        return self.lowest < math.inf

    def _judge(self, mean: float) -> bool:
        """Count a window; whether it is the lowest so far, by however little."""
        improved = mean < self.best - self.config.min_delta
        self.best = mean if improved else self.best  # a slow fall adds up to one that counts
        self.bad_windows = 0 if improved else self.bad_windows + 1
        self.total, self.batches, self.steps = 0.0, 0, 0
        lowest = mean < self.lowest
        self.lowest = mean if lowest else self.lowest
        return lowest

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        numbers = {k: float(getattr(self, k)) for k in ("best", "lowest", "bad_windows", "total", "batches", "steps")}
        return {"monitor": self.config.monitor, **numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the windows; those of another figure say nothing."""
        if state_dict.get("monitor", self.config.monitor) != self.config.monitor:
            return
        self.best, self.total = state_dict["best"], state_dict["total"]
        self.lowest = state_dict.get("lowest", self.best)  # versions before it exported the window of `best`
        self.bad_windows, self.batches, self.steps = (int(state_dict[k]) for k in ("bad_windows", "batches", "steps"))


def _at_a_limit(trainer: L.Trainer) -> bool:
    """Whether a limit of the config ends the run with this step; a stop by a signal does not."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
    return any(isinstance(callback, EarlyEnd) and callback.reached for callback in callbacks)
