"""How a pool larger than a batch gives the slots of a batch."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.distillation.pool import NoisyPool

Draw = Callable[[NoisyPool, int, np.random.Generator], Tensor]


def draw_stratified(pool: NoisyPool, batch_size: int, rng: np.random.Generator) -> Tensor:
    """Indices (B,) of distinct slots, one from each of B equal strata of the slots sorted by t, equal t at random.

    Every slot has the probability B/N of a uniform draw, so the loss keeps its expectation; a batch covers t evenly
    (VDM, App. I.1, for the t of a pool). Where B does not divide N, N mod B random slots do not count for the strata.

    Raises:
        UserError: more slots than the pool has.
    """
    pool.require_slots(batch_size)
    t = pool.t.numpy()
    spare = rng.choice(len(t), len(t) % batch_size, replace=False)
    counts = np.bincount(t) - np.bincount(t[spare], minlength=t.max() + 1)
    size = len(t) // batch_size
    ranks = np.arange(batch_size) * size + rng.integers(size, size=batch_size)  # places in the order by t
    drawn_t = np.searchsorted(counts.cumsum(), ranks, side="right")
    return torch.from_numpy(_slots_at(t, drawn_t, rng))


def _slots_at(t: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distinct random slots whose t (B,) are the wanted ones, in ascending order; only slots at these t are sorted."""
    asked = np.zeros(t.max() + 1, dtype=bool)
    asked[wanted] = True
    slots = rng.permutation(np.flatnonzero(asked[t]))
    small = t[slots].astype(np.min_scalar_type(t.max()))  # NumPy sorts 16-bit integers by radix
    order = small.argsort(kind="stable")
    first, repeated = np.searchsorted(small[order], wanted), np.searchsorted(wanted, wanted)
    return slots[order[first + np.arange(len(wanted)) - repeated]]


DRAWS: dict[str, Draw] = {"uniform": NoisyPool.draw, "stratified": draw_stratified}
