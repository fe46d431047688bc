"""Deal the pools of a saved run to another number of ranks: every slot is kept."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.errors import MALFORMED, unreadable


def slots_in(file: Path) -> int:
    """Number of slots in a pool file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return int(opened.get_slice("t").get_shape()[0])
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise unreadable(file, f"not a readable pool file ({error})", error) from error


def share(files: Sequence[Path], rank: int, ranks: int) -> int:
    """Slots that a rank gets of all slots: one of `ranks` that follow each other."""
    return len(range(rank, sum(map(slots_in, files)), ranks))


def redeal(pool: NoisyPool, files: Sequence[Path], rank: int, ranks: int, origin: str | None = "") -> None:
    """Fill a rank's pool, of `share` slots, with every `ranks`-th slot of the files, joined in their order.

    Args:
        pool: of the rank.
        files: of all ranks that have saved.
        rank, ranks: this rank and their number now.
        origin: as `NoisyPool.load`.

    Raises:
        UserError: a file that is damaged, or of another teacher's states.
    """
    before, filled = 0, 0
    for file in files:
        saved = NoisyPool(slots_in(file), tuple(pool.x.shape[1:]), pool.x.dtype, labeled=pool.label is not None)
        saved.load(file, origin)
        own = slice((rank - before) % ranks, None, ranks)
        count = len(saved.t[own])
        for name, theirs in saved.tensors().items():
            getattr(pool, name)[filled : filled + count] = theirs[own]
        before, filled = before + len(saved), filled + count
    pool.filled = filled
