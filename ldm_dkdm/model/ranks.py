"""Processes that sample or measure together: which this is, and how they exchange what they have."""

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import distributed

from ldm_dkdm.device import main_address, main_port, started
from ldm_dkdm.errors import UserError

T = TypeVar("T")
MEETING = timedelta(minutes=30)  # for which a process waits until all have started
WAIT = timedelta(days=30)  # for work of the others; a connection to a process that has ended fails at once


@dataclass(frozen=True)
class Ranks:
    """The processes that work together: this one's rank, and their number."""

    rank: int = 0
    ranks: int = 1
    group: Any = field(default=None, compare=False)  # process group; None is torch.distributed's default

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
            distributed.barrier(self.group)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        found: list[Any] = [value] * self.ranks
        if self.ranks > 1:
            distributed.all_gather_object(found, value, self.group)
        return found

    def from_first(self, value: T) -> T:
        """The first process's value."""
        found = [value]
        if self.ranks > 1:
            distributed.broadcast_object_list(found, 0, self.group)
        return found[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """What the first process computes, in every process.

        Raises:
            UserError: the first process's, in every process; in the others for any other error of the first one.
        """
        if self.ranks == 1:
            return work()
        if not self.first:
            value, mistake = self.from_first(cast(tuple[T | None, UserError | None], (None, None)))
            if mistake is not None:
                raise mistake
            return cast(T, value)
        try:
            value = work()
        except Exception as error:  # the others wait for it
            shared = error if isinstance(error, UserError) else UserError(f"the first process failed: {error!r}")
            self.from_first((None, shared))
            raise
        self.from_first((value, None))
        return value


ALONE = Ranks()
_joined: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def joined() -> Ranks:
    """The processes that `together` has joined; this one alone outside of it."""
    return _joined.get()


@contextmanager
def together(go_on: str = "call it again to continue", wait: timedelta = WAIT) -> Iterator[Ranks]:
    """Join the processes that torchrun or srun has started, on the host: inside the block they share the work.

    Args:
        go_on: how to continue, for the message where a process is lost.
        wait: for which a process waits for the others' work.

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
            distributed.init_process_group("gloo", address, MEETING, world_size=world.ranks, rank=world.rank)
            atexit.register(_leave)
        token = _joined.set(Ranks(world.rank, world.ranks, distributed.new_group(timeout=wait, backend="gloo")))
        try:
            yield joined()
            joined().wait()
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
