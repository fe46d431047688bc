"""Read the tables that a training writes, as one series of points per column."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm_dkdm.errors import UserError

Row = dict[str, float]
MAX_BYTES, MAX_ROWS = 100_000_000, 500_000  # limits of a table; a row takes 1 kB of memory until it is drawn
MAX_LINE = 100_000  # bytes of a line
MAX_POINTS = 2000  # largest number of points in a curve
UNSHOWN = {"step", "epoch"}  # columns that are not figures


@dataclass(frozen=True)
class Series:
    """Points of one column, by training step, ascending."""

    steps: Sequence[int]
    values: Sequence[float]


def read_series(files: Sequence[Path]) -> dict[str, Series]:
    """The columns of CSV files that continue each other; empty and non-finite cells are skipped.

    A run that went back to an older checkpoint repeats steps: the later rows count.

    Raises:
        UserError: a cell that is not a number, a row of another length than its header, or no column `step`.
    """
    rows = list(joined(row for file in files for row in read_rows(file)))
    names = dict.fromkeys(name for row in rows for name in row if name not in UNSHOWN)
    return {name: _column(rows, name) for name in names}


def _column(rows: Iterable[Row], name: str) -> Series:
    points = [(int(row["step"]), row[name]) for row in rows if name in row]
    return Series([step for step, _ in points], [value for _, value in points])


def joined(rows: Iterable[Row]) -> list[Row]:
    """Rows in order of their steps: one at step s removes earlier ones after s, and completes one at s."""
    kept: list[Row] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        if kept and kept[-1]["step"] == row["step"]:
            kept[-1] |= row
        else:
            kept.append(dict(row))
    return kept


def read_rows(file: Path) -> Iterator[Row]:
    """The numbers in each row of a CSV file, without empty and non-finite cells; errors as `read_series`."""
    _require_modest(file)
    for cells in read_cells(file, _refuse):
        row = {name: _number(cell, f"{file}: step {cells['step']}, {name}") for name, cell in cells.items() if cell}
        yield {name: value for name, value in row.items() if math.isfinite(value)}


def read_cells(file: Path, damaged: Callable[[str], object]) -> Iterator[dict[str, str]]:
    """The rows of a table that a training writes, as column -> text, one at a time; none without a file.

    A last line without an end is left out: a crash has cut it off, or it is being written.

    Args:
        damaged: called with what is wrong where a file or a row is not of a table with the column `step`; if it does
            not raise, these are left out.
    """
    header: list[str] = []
    for number, cells in enumerate(_lines(file), 1):
        problem = _problem(number, cells, header)
        if problem or isinstance(cells, str):
            damaged(f"{file}: {problem}")
            if not header:
                return
        elif header:
            yield dict(zip(header, cells))
        else:
            header = cells


def _lines(file: Path) -> Iterator[list[str] | str]:
    """The cells of every whole line, or what is wrong with it; no more than MAX_LINE bytes are in memory."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        while line := opened.readline(MAX_LINE):
            problem = ""
            while line and not line.endswith(b"\n"):
                problem, line = f"is longer than {MAX_LINE:,} bytes", opened.readline(MAX_LINE)
            if not line:
                return
            try:
                yield problem or next(csv.reader([line.decode()]), [])
            except (UnicodeDecodeError, csv.Error) as error:
                yield f"is not text ({error})"


def _problem(number: int, cells: list[str] | str, header: Sequence[str]) -> str:
    """What is wrong with a line; an empty text if nothing is."""
    if isinstance(cells, str):
        return f"line {number} {cells}" if header else f"not a table of numbers (line {number} {cells})"
    if not header:
        return "" if "step" in cells else "has no column step"
    if len(cells) != len(header):
        return f"line {number} has {len(cells)} cells, the header {len(header)}"
    return "" if _is_finite(dict(zip(header, cells))["step"]) else f"line {number} has no step"


def _require_modest(file: Path) -> None:
    if not file.is_file():
        return
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file}: is longer than {MAX_BYTES / 1e6:g} MB, too long for a table to draw")
    with file.open("rb") as opened:
        if sum(1 for _ in opened) > MAX_ROWS:
            raise UserError(f"{file}: has more than {MAX_ROWS} rows, too many for a table to draw")


def _refuse(problem: str) -> None:
    raise UserError(problem)


def _is_finite(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise UserError(f"{where}: '{cell}' is not a number") from None


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """At most `most` points at even distances, the first and the last among them."""
    kept = spread(len(series.steps), most)
    return Series([series.steps[i] for i in kept], [series.values[i] for i in kept])


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices below `count` at even distances, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
