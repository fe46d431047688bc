"""A signal, or data that cannot be read, ends a run at a whole iteration, so that what is saved is exact."""

import os
import select
import signal
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import lightning as L

from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import logger
from ldm_dkdm.training.ends import StepCallback
from ldm_dkdm.training.hosts import any_host

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has no such signal
OUTPUTS = (1, 2)  # file descriptors of stdout and stderr
READER_ENDS = 1000  # ms in which the reader of a pipe ends that the hang-up ends too
Handler = Callable[[int, FrameType | None], Any] | int | None


class GracefulStop(StepCallback):
    """Context manager and Lightning callback: the first signal asks for a stop, a second one forces it.

    A hang-up forces nothing, since a closed terminal may send several, and one that is ignored (nohup) stays so.

    Args:
        signals: the signals; their handlers are restored after the block.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signals = signals
        self.requested = False
        self.fault: Exception | None = None  # error of a batch to come, which ends the run as a signal does
        self._previous: dict[int, Handler] = {}
        self._terminals: list[int] = []  # outputs that may hang up
        self._pipes: list[int] = []  # outputs whose reader, such as tee, may end

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            ignored = [HANGUP] if HANGUP is not None and signal.getsignal(HANGUP) == signal.SIG_IGN else []
            heard = [number for number in self.signals if number not in ignored]
            self._terminals = [output for output in OUTPUTS if os.isatty(output)]
            self._pipes = [output for output in OUTPUTS if _is_pipe(output)]
            self._previous = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            self._leave_lost_outputs()
        if self.requested:
            if number == HANGUP:
                return
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this iteration and saving (once more: stop at once)")

    def _leave_lost_outputs(self) -> None:
        """Redirect the output for a closed terminal, or a reader that it ended, to os.devnull: a write ends the run."""
        lost = [output for output in self._terminals if not os.isatty(output)]
        for output in (*lost, *filter(_has_no_reader, self._pipes)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        for number in self._previous:  # Lightning's own handler of SIGTERM would end the run before it is saved
            signal.signal(number, self._on_signal)

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if any_host(trainer, self.requested or self.fault is not None):
            trainer.should_stop = True

    def on_fault(self, error: Exception) -> None:
        """Ask for a stop because of the error of a batch to come."""
        self.fault = error

    def raise_fault(self, saved: str) -> None:
        """Raise the error that has ended the run, if one has; a `UserError` also says what is `saved`."""
        if isinstance(self.fault, UserError):
            raise type(self.fault)(f"{self.fault}; {saved}") from self.fault
        if self.fault is not None:
            raise self.fault


def _is_pipe(output: int) -> bool:
    with suppress(OSError):  # it is closed
        return stat.S_ISFIFO(os.fstat(output).st_mode)
    return False


def _has_no_reader(pipe: int) -> bool:
    watch = select.poll()
    watch.register(pipe, 0)  # errors are reported always
    return bool(watch.poll(READER_ENDS))
