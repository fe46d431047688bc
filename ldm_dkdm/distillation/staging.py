"""Move slots between a pool and the device that trains, beside its work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_dkdm.device import WITHOUT_PINNED, to_device
from ldm_dkdm.distillation.pool import NoisyPool

States = tuple[Tensor, Tensor | None]  # x (B,C,H,W), label (B,) or None


class Slots(Protocol):
    """The slots of a pool, as a device sees them."""

    def take(self, indices: Tensor) -> States:
        """States, float32, and labels, int64, of slots (B,), on the device."""

    def put_back(self, indices: Tensor, x: Tensor, label: Tensor | None) -> None:
        """Overwrite slots (B,) with states and labels of the device."""

    def expect(self, indices: Tensor) -> None:
        """Slots (B,) that the next call of `take` names."""


def slots_on(pool: NoisyPool, device: torch.device) -> Slots:
    """The slots of a pool for a device: those of host memory travel to a GPU on a stream of their own."""
    if pool.device.type == "cpu" and device.type not in WITHOUT_PINNED:
        return StagedSlots(pool, CudaLane(device))
    return DirectSlots(pool, device)


@dataclass(frozen=True)
class DirectSlots:
    """Slots of a pool that is on the device, or on a host that is the device."""

    pool: NoisyPool
    device: torch.device

    def take(self, indices: Tensor) -> States:
        """States and labels of slots (B,)."""
        slots = self.pool.take(indices)
        return slots.x.to(self.device), None if slots.label is None else slots.label.to(self.device)

    def put_back(self, indices: Tensor, x: Tensor, label: Tensor | None) -> None:
        """Overwrite slots (B,)."""
        self.pool.overwrite(indices, x, label)

    def expect(self, indices: Tensor) -> None:
        """Nothing has to travel."""


class Lane(Protocol):
    """Copies between host and device that run beside the device's work."""

    def upload(self, tensor: Tensor, indices: Tensor) -> Tensor:
        """Begin to copy the rows (B,) of a host tensor to the device."""

    def join(self) -> None:
        """Let the device's work that is queued from now on wait for all copies begun so far."""

    def download(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Begin to copy a device tensor; returns the host tensor, and a function that waits for its content."""


class CudaLane:
    """A CUDA stream for copies, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def upload(self, tensor: Tensor, indices: Tensor) -> Tensor:
        """Begin to copy rows."""
        pinned = torch.empty((len(indices), *tensor.shape[1:]), dtype=tensor.dtype, device="cpu", pin_memory=True)
        torch.index_select(tensor, 0, indices, out=pinned)
        with torch.cuda.stream(self.stream):
            copied = pinned.to(self.device, non_blocking=True)
        copied.record_stream(torch.cuda.current_stream(self.device))
        return copied

    def join(self) -> None:
        """Queue a wait."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def download(self, tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Begin to copy a tensor, once the work queued so far has made it."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            pinned.copy_(tensor, non_blocking=True)
            done = self.stream.record_event()
        tensor.record_stream(self.stream)
        return pinned, done.synchronize


@dataclass(frozen=True)
class _Write:
    """Slots that are on their way back: on the device, and in host memory once the waits are over."""

    indices: Tensor
    x: Tensor
    label: Tensor | None
    host_x: Tensor
    host_label: Tensor | None
    waits: list[Callable[[], None]]


@dataclass(frozen=True)
class _Fetch:
    """Slots that are on their way to the device, as they were before `missed` was written."""

    indices: Tensor
    x: Tensor
    label: Tensor | None
    missed: _Write | None


class StagedSlots:
    """Slots of a pool in host memory: the next ones come and the last ones go while the device computes.

    A batch is written to the pool one `put_back` later. Slots that are fetched before are taken from the device's own
    copy, so that every batch is the one of `DirectSlots`, bit for bit.

    Args:
        pool: in host memory; its `settle` writes what is under way.
        lane: makes the copies.
    """

    def __init__(self, pool: NoisyPool, lane: Lane) -> None:
        self.pool, self.lane = pool, lane
        self._writing: _Write | None = None
        self._fetched: _Fetch | None = None
        pool.settle = self._settle

    def expect(self, indices: Tensor) -> None:
        """Begin to fetch slots (B,)."""
        x = self.lane.upload(self.pool.x, indices)
        label = None if self.pool.label is None else self.lane.upload(self.pool.label, indices)
        self._fetched = _Fetch(indices, x, label, self._writing)

    def take(self, indices: Tensor) -> States:
        """States and labels of slots (B,)."""
        if self._fetched is None or not torch.equal(self._fetched.indices, indices):
            self.expect(indices)
        fetched = self._fetched
        assert fetched is not None  # set by `expect`
        self.lane.join()
        x, label = fetched.x, fetched.label
        if fetched.missed is not None:
            here, there = _shared(indices, fetched.missed.indices, x.device)
            x[here] = fetched.missed.x[there]
            if label is not None and fetched.missed.label is not None:
                label[here] = fetched.missed.label[there]
        return x.float(), None if label is None else label.long()

    def put_back(self, indices: Tensor, x: Tensor, label: Tensor | None) -> None:
        """Begin to write slots (B,), once those before are written."""
        self._settle()
        own_x, own_label = x.to(self.pool.x.dtype), None
        host_x, wait_x = self.lane.download(own_x)
        host_label, waits = None, [wait_x]
        if self.pool.label is not None:
            assert label is not None  # batches of a labelled pool have labels
            own_label = label.to(self.pool.label.dtype)
            host_label, wait_label = self.lane.download(own_label)
            waits.append(wait_label)
        self._writing = _Write(indices, own_x, own_label, host_x, host_label, waits)

    def _settle(self) -> None:
        if self._writing is not None:
            for wait in self._writing.waits:
                wait()
            self.pool.overwrite(self._writing.indices, self._writing.host_x, self._writing.host_label)
            self._writing = None


def _shared(indices: Tensor, others: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the slots that are in both sets of distinct indices, in each of them, on the device."""
    where = {slot: position for position, slot in enumerate(others.tolist())}
    pairs = [(here, where[slot]) for here, slot in enumerate(indices.tolist()) if slot in where]
    positions = torch.tensor(pairs, dtype=torch.long, device="cpu").view(-1, 2).T.contiguous()
    here, there = to_device(positions, device)
    return here, there
