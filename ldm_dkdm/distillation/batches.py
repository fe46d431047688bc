"""The base class of the streams of training batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch.utils.data import IterableDataset

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
