"""The logger, progress bars or lines, and byte counts and durations for messages."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from tqdm import tqdm

logger = logging.getLogger("ldm_dkdm")
logger.addHandler(logging.NullHandler())  # commands print the log, programs decide themselves

Progress = Callable[[str, int, int], None]  # (what, done, total)
SECONDS_BETWEEN_LINES = 60.0


def on_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can redraw itself."""
    return sys.stderr.isatty()


class Lines:
    """Progress as a line a minute on stderr, for log files: `warm-up 1200/4000, 3.4 call/s, ETA 13:43`.

    Args:
        what: name of the work. unit: what is counted. total: number of units. initial: number done before.
    """

    def __init__(self, what: str, unit: str, total: int, initial: int = 0) -> None:
        self.what, self.unit, self.total, self.initial = what, unit, total, initial
        self._start = self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether a minute has passed since the last line."""
        return time.monotonic() - self._last >= SECONDS_BETWEEN_LINES

    def show(self, done: int, figures: Mapping[str, float] = MappingProxyType({}), last: bool = False) -> None:
        """Write a line if one is due or it is the last, with `figures` at its end."""
        if not self.due and not last:
            return
        self._last = time.monotonic()
        rate = max(1e-9, done - self.initial) / max(1e-9, self._last - self._start)
        pace = f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"
        if last:
            left = f"took {tqdm.format_interval(self._last - self._start)}"
        else:
            left = f"ETA {tqdm.format_interval(max(0, self.total - done) / rate) if done > self.initial else '?'}"
        shown = "".join(f", {name} {value:.4g}" for name, value in figures.items())
        sys.stderr.write(f"{self.what} {done}/{self.total}, {pace}, {left}{shown}\n")
        sys.stderr.flush()


@contextmanager
def following(
    progress: bool | Progress, what: str, unit: str, total: int, initial: int = 0
) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number done of `total`.

    Args:
        progress: True shows a bar with an ETA, or a line a minute where stderr is not a terminal; False nothing; a
            function is called with (what, done, total).
        what: name of the work. unit: what is counted. initial: number done before.
    """
    if callable(progress):
        yield lambda done: progress(what, done, total)
        return
    if progress and not on_terminal():
        yield Lines(what, unit, total, initial).show
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


def counted(number: int, noun: str) -> str:
    """A number of things, such as 1 chain or 1,000 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
