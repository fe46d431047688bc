"""The base class of the streams of training batches, and reading ahead of the training."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator

from torch.utils.data import IterableDataset

from ldm_dkdm.errors import Stopped, UserError
from ldm_dkdm.records import DistillBatch


class BatchStream(IterableDataset[DistillBatch], ABC):
    """`max_steps` batches, from `step` on; a known length keeps Lightning from fetching one batch ahead."""

    step: int
    max_steps: int

    def __len__(self) -> int:
        return self.max_steps

    def __iter__(self) -> Iterator[DistillBatch]:
        while self.step < self.max_steps:
            yield self.next_batch()

    @abstractmethod
    def next_batch(self) -> DistillBatch:
        """The batch of the current step; advances it."""


class ReadAhead(BatchStream):
    """Makes a stream's batches one optimizer step before they are needed, so that a fault in them costs no step.

    Args:
        stream: batches that are read from files.
        ahead: batches of an optimizer step.
        on_fault: called with the error of a batch that cannot be made, before the batches of the last whole step.
    """

    def __init__(self, stream: BatchStream, ahead: int, on_fault: Callable[[Exception], None]) -> None:
        self.stream, self.ahead, self.on_fault = stream, ahead, on_fault
        self.step, self.max_steps = stream.step, stream.max_steps
        self._made: deque[DistillBatch] = deque()
        self._fault: Exception | None = None

    def next_batch(self) -> DistillBatch:
        """The batch of the current step.

        Raises:
            UserError: a file that cannot be read, where no whole optimizer step is left.
        """
        while self._fault is None and len(self._made) <= self.ahead and self.stream.step < self.max_steps:
            try:
                self._made.append(self.stream.next_batch())
            except Stopped:
                raise
            except Exception as error:  # whatever it is, the steps before it are saved
                self._fault = UserError(f"{error}; repair or replace it") if type(error) is UserError else error
                if len(self._made) < self.ahead:
                    raise self._fault from error
                self.on_fault(self._fault)
        if not self._made:
            assert self._fault is not None  # nobody asks for a batch after the last one
            raise self._fault
        self.step += 1
        return self._made.popleft()
