"""Processes that sample or measure together: which this is, and how they exchange what they have."""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.device import main_address, main_port, started
from ldm_dkdm.errors import UserError
from ldm_dkdm.model.diffusion_model import DiffusionModel
from ldm_dkdm.model.sampling import sample_batches, starts_of

T = TypeVar("T")
MINUTES = 30.0  # for which a process waits for the others


@dataclass(frozen=True)
class Ranks:
    """The processes that work together: this one's rank, and their number."""

    rank: int = 0
    ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items: one of `ranks` that follow each other."""
        return items[self.rank :: self.ranks]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.ranks > 1:
            distributed.barrier()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        found: list[Any] = [value] * self.ranks
        if self.ranks > 1:
            distributed.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value."""
        found = [value]
        if self.ranks > 1:
            distributed.broadcast_object_list(found, 0)
        return found[0]


ALONE = Ranks()
_joined: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def joined() -> Ranks:
    """The processes that `together` has joined; this one alone outside of it."""
    return _joined.get()


@contextmanager
def together(go_on: str = "call it again to continue", minutes: float = MINUTES) -> Iterator[Ranks]:
    """Join the processes that torchrun or srun has started, on the host: inside the block they share the work.

    Args:
        go_on: how to continue, for the message where a process is lost.
        minutes: for which a process waits for the others.

    Raises:
        UserError: another process has ended or does not answer.
    """
    world = started()
    if world is None or world.ranks == 1:
        yield ALONE
        return
    # torchrun's agent holds the store of its processes
    address = None if world.by == "torchrun" else f"tcp://{main_address()}:{main_port()}"
    with losing(world.ranks, go_on):
        if not distributed.is_initialized():  # once a process: a second group would meet the first one's addresses
            distributed.init_process_group(
                "gloo", address, timedelta(minutes=minutes), world_size=world.ranks, rank=world.rank
            )
            atexit.register(_leave)
        token = _joined.set(Ranks(world.rank, world.ranks))
        try:
            yield joined()
            distributed.barrier()
        finally:
            _joined.reset(token)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def losing(ranks: int, go_on: str) -> Iterator[None]:
    """Say in one line that another process has ended, where communication with it fails.

    Args:
        ranks: their number; one alone loses nobody.
        go_on: how the work is continued.

    Raises:
        UserError: a process was lost.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error).lower()  # gloo's have no class
        if ranks == 1 or not lost:
            raise
        first = str(error).strip().partition("\n")[0].partition(". ")[0]
        reason = first.partition(".cc:")[2].partition("] ")[2] or first
        raise UserError(f"another process of the run has ended or does not answer ({reason}); {go_on}") from error


def sample_together(model: DiffusionModel, config: SamplingConfig) -> torch.Tensor:
    """Images uint8 (N,H,W,C) in every process: those of one process, which draws the same batches."""
    ranks, starts = joined(), starts_of(config)
    own = [batch.images for batch in sample_batches(model, config, ranks.share(starts))]
    parts = ranks.gather(own)
    return torch.cat([parts[number % ranks.ranks][number // ranks.ranks] for number in range(len(starts))])
