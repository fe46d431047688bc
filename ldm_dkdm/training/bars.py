"""Progress of a Lightning run, and its data module without epochs."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ldm_dkdm.reporting import Lines, Progress, counted, on_terminal
from ldm_dkdm.training.ends import StepCallback, figures_of


def progress_callback(progress: bool | Progress) -> L.Callback | None:
    """What shows a training: a bar, lines where stderr is not a terminal, calls of a function, or nothing."""
    if callable(progress):
        return ProgressCalls(progress)
    if not progress:
        return None
    return ProgressBar(refresh_rate=10) if on_terminal() else ProgressLines()


def expected_steps(trainer: L.Trainer, module: L.LightningModule) -> int:
    """The step at which a run will end: that of its time limit if that comes first."""
    used, done = getattr(module, "time_used", 0.0), trainer.global_step
    return min(trainer.max_steps, max(done, round(done / used))) if used else trainer.max_steps


class Glance:
    """Figures of a device without waiting for it: those of the glance before, which have long arrived."""

    def __init__(self) -> None:
        self._coming: dict[str, Tensor | float] = {}

    def at(self, figures: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The newest figures that are on the host."""
        arrived = self._coming
        tensors = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
        self._coming = {**figures, **{name: value.to("cpu", non_blocking=True) for name, value in tensors.items()}}
        waits = any(value.device.type != "cpu" for value in tensors.values())
        return {name: float(value) for name, value in (arrived if waits else self._coming).items()}


class ProgressBar(TQDMProgressBar):
    """Steps, speed, ETA and losses on stderr; a stream has no epochs, and the logger's version is left out."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__(**numbers)
        self._glance = Glance()

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(  # as Lightning's, which goes to stdout, where the command prints its result
            desc="training",
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_start(self, trainer: L.Trainer, *args: object) -> None:
        super().on_train_start(trainer, *args)
        bar, done = self.train_progress_bar, trainer.global_step * trainer.accumulate_grad_batches
        bar.reset(total=trainer.max_steps * trainer.accumulate_grad_batches)
        bar.initial = bar.n = done  # a resumed epoch has no start of its own
        bar.set_description("training")

    def on_train_epoch_start(self, trainer: L.Trainer, *args: object) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.total = trainer.max_steps * trainer.accumulate_grad_batches
        self.train_progress_bar.set_description("training")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, module, *args)
        self.train_progress_bar.total = expected_steps(trainer, module) * trainer.accumulate_grad_batches

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_exception(trainer, *args)
        with contextlib.suppress(TypeError):  # no bar before the training starts
            self.train_progress_bar.close()  # the next output begins on a line of its own

    def get_metrics(
        self, trainer: L.Trainer, module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return dict(self._glance.at(figures_of(module)))


class StreamModule(L.LightningDataModule):
    """Makes the stream when Lightning knows the device; the stream starts at the resumed step."""

    def __init__(self, stream_for: Callable[[L.Trainer], IterableDataset[Any]]) -> None:
        super().__init__()
        self.stream_for = stream_for

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None  # set by the trainer
        return DataLoader(self.stream_for(self.trainer), batch_size=None, num_workers=0)


class ProgressCalls(StepCallback):
    """Calls a function (what, done, total) after every step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.progress("training", trainer.global_step, trainer.max_steps)


class ProgressLines(StepCallback):
    """Writes the number of steps on stderr, step, speed, ETA and losses once a minute, and the time at the end."""

    lines: Lines  # made when the training starts

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.lines = Lines("step", "it", trainer.max_steps, trainer.global_step)
        if trainer.is_global_zero and trainer.global_step < trainer.max_steps and not trainer.should_stop:
            self.lines.begin(f"training: {counted(trainer.max_steps, 'step')}")

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.lines.total = expected_steps(trainer, module)
            self.lines.show(trainer.global_step, _numbers(module) if self.lines.due else {})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The last line: where the training ended."""
        if trainer.is_global_zero and trainer.global_step > self.lines.initial:
            self.lines.total = trainer.global_step
            self.lines.end(_numbers(module))


def _numbers(module: L.LightningModule) -> dict[str, float]:
    """The figures of a module on the host; waits for the device."""
    return {name: float(value) for name, value in figures_of(module).items()}
