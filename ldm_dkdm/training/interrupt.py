"""A signal ends a run at the next whole iteration, so that what is saved is exact."""

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import lightning as L

from ldm_dkdm.reporting import logger
from ldm_dkdm.training.ends import StepCallback
from ldm_dkdm.training.hosts import any_host

Handler = Callable[[int, FrameType | None], Any] | int | None


class GracefulStop(StepCallback):
    """Context manager and Lightning callback: the first signal asks for a stop, a second one forces it.

    Args:
        signals: the signals; their handlers are restored after the block.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signals = signals
        self.requested = False
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in self.signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this iteration and saving (once more: stop at once)")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        for number in self._previous:  # Lightning's own handler of SIGTERM would end the run before it is saved
            signal.signal(number, self._on_signal)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if any_host(trainer, self.requested):
            trainer.should_stop = True
