"""Say before a training on a CPU that its threads would wait for other programs'."""

import os
import time
from pathlib import Path

from ldm_dkdm.reporting import logger

STAT = Path("/proc/stat")  # Linux's counters
SECONDS = 0.3  # for which the cores are watched
IDLE, WAITING = 3, 4  # counters of a core without work


def warn_if_busy(threads: int, stat: Path = STAT, seconds: float = SECONDS) -> None:
    """A line if the cores that this process may use are too busy for its threads; none where that cannot be told.

    The threads of a product end together: one that has to share its core delays all of them (docs/install.md).
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if threads < 2 or threads > len(cores):
        return
    before = _counters(stat, cores)
    time.sleep(seconds)
    after = _counters(stat, cores)
    if before is None or after is None:
        return
    total, idle = (now - then for now, then in zip(after, before, strict=True))
    busy = round(len(cores) * (1 - idle / total)) if total > 0 else 0
    if busy and busy + threads > len(cores):
        logger.warning(
            f"other programs keep {busy} of {len(cores)} cores busy: {threads} threads that have to share a core can "
            f"be slower than one; end the others, or set OMP_NUM_THREADS={max(1, len(cores) - busy)}"
        )


def _counters(stat: Path, cores: set[int]) -> tuple[int, int] | None:
    """Ticks of these cores, all and without work; None where the system does not count them."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
        ticks = [[int(word) for word in words[1:9]] for words in lines if words[0] in {f"cpu{n}" for n in cores}]
        return sum(map(sum, ticks)), sum(own[IDLE] + own[WAITING] for own in ticks)
    except (OSError, ValueError, IndexError):
        return None
