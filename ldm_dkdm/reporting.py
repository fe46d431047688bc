"""The logger, progress bars, and byte counts and durations for messages."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

logger = logging.getLogger("ldm_dkdm")
logger.addHandler(logging.NullHandler())  # commands print the log, programs decide themselves

Progress = Callable[[str, int, int], None]  # (what, done, total)


@contextmanager
def following(
    progress: bool | Progress, what: str, unit: str, total: int, initial: int = 0
) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number done of `total`.

    Args:
        progress: True shows a bar with an ETA, False nothing; a function is called with (what, done, total).
        what: name of the work. unit: what is counted. initial: number done before.
    """
    if callable(progress):
        yield lambda done: progress(what, done, total)
        return
    with tqdm(total=total, initial=initial, desc=what, unit=unit, disable=not progress) as bar:
        yield lambda done: bar.update(done - bar.n)


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Log what fails while a grid, a card or a figure is made, and go on: none is worth a run."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{what}: left out ({type(error).__name__}: {error})")


def size(count: float) -> str:
    """A number of bytes, such as 1.5 GB."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """A time span, such as 90 s or 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    if seconds < 730 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 86400 / 365:.0f} years"


def pace(seconds: float) -> str:
    """Seconds per item, to three digits."""
    return f"{seconds:.3g} s" if seconds < 100 else duration(seconds)
