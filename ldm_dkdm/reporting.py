"""The logger, progress bars or lines, and names, numbers, durations and paths for messages."""

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm

logger = logging.getLogger("ldm_dkdm")
logger.addHandler(logging.NullHandler())  # commands print the log, programs decide themselves

Progress = Callable[[str, int, int], None]  # (what, done, total)
SECONDS_BETWEEN_LINES = 60.0


def on_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can redraw itself; a closed stderr is not."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Lines:
    """Progress as lines on stderr, for log files: one at the start, one a minute, one at the end.

    `warm-up: 10,240 calls of the teacher`, then `warm-up 1200/10240, 3.4 call/s, ETA 13:43`, then `..., took 50:11`.

    Args:
        what: name of the work. unit: what is counted. total: number of units. initial: number done before.
    """

    def __init__(self, what: str, unit: str, total: int, initial: int = 0) -> None:
        self.what, self.unit, self.total, self.initial = what, unit, total, initial
        self.done = initial
        self._start = self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether a minute has passed since the last line."""
        return time.monotonic() - self._last >= SECONDS_BETWEEN_LINES

    def begin(self, work: str) -> None:
        """Write the line at the start: `work`, which says what begins and how much, and what of it is done."""
        _write(work + (f", {self.initial:,} of them done before" if self.initial else ""))

    def show(self, done: int, figures: Mapping[str, float] = MappingProxyType({})) -> None:
        """Take the number done, and write a line if one is due, with `figures` at its end."""
        self.done = done
        if self.due:
            left = f"ETA {tqdm.format_interval(max(0, self.total - done) / self._rate)}" if self._moved else "ETA ?"
            self._line(left, figures)

    def end(self, figures: Mapping[str, float] = MappingProxyType({})) -> None:
        """Write the last line, with the time that all took."""
        self._line(f"took {tqdm.format_interval(time.monotonic() - self._start)}", figures)

    @property
    def _moved(self) -> bool:
        return self.done > self.initial

    @property
    def _rate(self) -> float:
        """Units a second."""
        return max(1e-9, self.done - self.initial) / max(1e-9, time.monotonic() - self._start)

    def _line(self, time_of_it: str, figures: Mapping[str, float]) -> None:
        rate = self._rate
        pace = f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"
        shown = "".join(f", {name} {value:.4g}" for name, value in figures.items())
        _write(f"{self.what} {self.done}/{self.total}, {pace}, {time_of_it}{shown}")
        self._last = time.monotonic()


def _write(line: str) -> None:
    with suppress(AttributeError, OSError, ValueError):  # stderr is None, its reader left, or it is closed
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def following(
    progress: bool | Progress, what: str, unit: str, total: int, initial: int = 0, of: str = ""
) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with the number done of `total`.

    Args:
        progress: True shows a bar with an ETA, or lines where stderr is not a terminal (`Lines`); False nothing; a
            function is called with (what, done, total).
        what: name of the work. unit: what is counted. initial: number done before.
        of: what the units belong to, for the line at the start.
    """
    if callable(progress):
        yield lambda done: progress(what, done, total)
        return
    if progress and not on_terminal():
        lines = Lines(what, unit, total, initial)
        if total > initial:
            lines.begin(f"{what}: {counted(total, unit)}{f' of {of}' if of else ''}")
        yield lines.show
        if total > initial:
            lines.end()
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


def in_home(path: str | Path) -> str:
    """A path for messages, with ~ for the home folder."""
    try:
        return f"~/{Path(path).relative_to(Path.home())}"
    except (ValueError, RuntimeError):  # elsewhere, or this user has no home folder
        return str(path)


def names_apart(paths: Sequence[Path], details: Sequence[Sequence[str]] = ()) -> list[str]:
    """Names for models: the last two parts of their paths, such as quickstart/student, and more where those are alike.

    A snapshot in the Hub's cache is OWNER/NAME. What is added tells alike names apart: folders above of other paths,
    then the snapshot, the details, a number. The names also differ with - in place of /, as names of folders.

    Args:
        paths: absolute paths.
        details: facts of each model, the weightiest first; empty texts add nothing.
    """
    parts, snapshots = zip(*map(_without_snapshot, paths), strict=True) if paths else ((), ())
    names = ["/".join(own[-2:]) for own in parts]
    for alike in _alike(names):
        ends, length = {parts[i] for i in alike}, 2
        while len({own[-length:] for own in ends}) < len(ends):
            length += 1
        for i in alike:
            names[i] = "/".join(parts[i][-length:])
    for facts in (snapshots, *zip(*details, strict=True)):
        for alike in _alike(names):
            if len({facts[i] for i in alike}) > 1:
                for i in alike:
                    names[i] += f"-{facts[i]}" if facts[i] else ""
    taken = {_flat(name) for name in names}
    for _, *others in _alike(names):
        for number, i in enumerate(others, 2):
            names[i] = next(n for k in itertools.count(number) if _flat(n := f"{names[i]}-{k}") not in taken)
            taken.add(_flat(names[i]))
    return names


def _without_snapshot(path: Path) -> tuple[tuple[str, ...], str]:
    """A path's parts with OWNER, NAME for models--OWNER--NAME/snapshots/HASH, and the hash."""
    parts = path.parts[1:]
    for i, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[i + 1] == "snapshots":
            return (*parts[:i], *part.split("--")[1:], *parts[i + 3 :]), parts[i + 2]
    return parts, ""


def _alike(names: Sequence[str]) -> list[list[int]]:
    """The places of names that several share."""
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(_flat(name), []).append(i)
    return [own for own in places.values() if len(own) > 1]


def _flat(name: str) -> str:
    return name.replace("/", "-")


def counted(number: int, noun: str) -> str:
    """A number of things, such as 1 chain, 1,000 images or 2 batches."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


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
