"""The exact chains of a warm-up: at which t each leaves a state, and how many teacher calls they take."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import counted


@dataclass(frozen=True)
class ChainBatch:
    """Chains that are walked together, and the slots that their states fill.

    Attributes:
        count: number of chains.
        lowest: the t at which the last of them has left its last state.
        slots, t, owner: (n,), on the host: each slot, its t, and the number of its chain in the batch.
    """

    count: int
    lowest: int
    slots: Tensor
    t: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Chains:
    """Chains from T-1 down, in the order of the slots that they fill.

    A chain of k slots and offset v leaves its states at t = (j T + v) // k, j = 0 ... k-1, about T / k apart. For v
    uniform in 0 ... T-1 the t of a chain are uniform together: j T + v runs once through 0 ... k T - 1, so that k of
    the k T pairs (j, v) give each t. Chains that end at nearly the same t follow each other, so that few calls are
    spent on chains that have ended.

    Attributes:
        copies: (N,), the k of each chain.
        offsets: (N,), the v of each chain.
        num_timesteps: T.
    """

    copies: np.ndarray
    offsets: np.ndarray
    num_timesteps: int

    @classmethod
    def drawn(cls, count: int, slots: int, num_timesteps: int, generator: np.random.Generator) -> "Chains":
        """`count` chains with random offsets that fill a pool of so many slots.

        Raises:
            UserError: they do not have enough states.
        """
        require_states(count, slots, num_timesteps)
        copies = np.diff(np.arange(count + 1) * slots // count)
        offsets = generator.integers(0, num_timesteps, count)
        order = np.argsort(offsets // copies, kind="stable")
        return cls(copies[order], offsets[order], num_timesteps)

    @property
    def starts(self) -> np.ndarray:
        """(N,), the first slot of each chain."""
        return np.cumsum(self.copies) - self.copies

    def batch(self, first: int, size: int) -> ChainBatch:
        """The chains that fill the slots from `first` on, at most `size` of them."""
        begin = int(np.searchsorted(self.starts, first))
        copies, offsets = (values[begin : begin + size] for values in (self.copies, self.offsets))
        owner = np.repeat(np.arange(len(copies)), copies)
        number = np.arange(len(owner)) - (np.cumsum(copies) - copies)[owner]
        t = (number * self.num_timesteps + offsets[owner]) // copies[owner]
        slots = first + torch.arange(len(owner), device="cpu")
        return ChainBatch(len(copies), int(t.min()), slots, torch.from_numpy(t), torch.from_numpy(owner))

    def calls(self, size: int, slots: int) -> int:
        """Single-sample teacher evaluations of the batches of `size` chains that begin before slot `slots`."""
        begins = np.arange(0, len(self.copies), size)
        counts = np.minimum(size, len(self.copies) - begins)
        steps = self.num_timesteps - 1 - self.offsets[begins] // self.copies[begins]
        return int((counts * steps)[self.starts[begins] < slots].sum())


def require_states(count: int, slots: int, num_timesteps: int, ranks: int = 1) -> None:
    """Refuse chains that have fewer states than the pool has slots.

    Args:
        count: number of chains of all ranks. slots: of one rank's pool. num_timesteps: T, the states of a chain.

    Raises:
        UserError: names the smallest number of chains.
    """
    wanted = -(-slots // num_timesteps)
    if -(-count // ranks) < wanted:
        raise UserError(
            f"images: {counted(count, 'chain')} of {num_timesteps} states cannot fill {ranks * slots:,} slots; the "
            f"smallest number is {ranks * (wanted - 1) + 1:,}"
        )


def expected_calls(count: int, slots: int, num_timesteps: int) -> int:
    """Single-sample teacher evaluations of `count` chains with random offsets, their expected number.

    A chain of k slots ends at v // k; its mean over v is (k q (q-1) / 2 + r q) / T, with T = q k + r.
    """
    copies, longer = divmod(slots, count)

    def of_all_offsets(k: int) -> int:
        q, r = divmod(num_timesteps, k)
        return num_timesteps * (num_timesteps - 1) - k * q * (q - 1) // 2 - r * q

    return ((count - longer) * of_all_offsets(copies) + longer * of_all_offsets(copies + 1)) // num_timesteps
