"""A CSV file that is appended to row by row, and stays one table through crashes and resumes."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_dkdm.files import write_text
from ldm_dkdm.reporting import logger
from ldm_dkdm.reports.tables import read_cells


class Table:
    """Rows with a `step`, in a CSV file.

    The file is opened with the first row. Rows past the step that the run is resumed at, and a line that a crash has
    cut off, are dropped; other lines that are not rows are dropped with a warning. A figure that first appears later
    gets a column of its own.

    Args:
        path: the file.
        columns: the order of the known columns.
        resumed_at: step of the checkpoint that the run continues from; 0 for a new run.
        optional: known columns that are left out of the file unless a row has them.
    """

    def __init__(self, path: Path, columns: Sequence[str], resumed_at: int, optional: Sequence[str] = ()) -> None:
        self.path, self.order, self.resumed_at, self.optional = path, list(columns), resumed_at, set(optional)
        self.columns: list[str] = []  # the columns in the file, once it is open

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; columns that it does not have stay empty."""
        if not self.columns:
            known = [name for name in self.order if name not in self.optional]
            self._write(known, row, read_cells(self.path, _left_out), self.resumed_at)
        elif not row.keys() <= set(self.columns):
            self._write(self.columns, row, read_cells(self.path, _left_out), int(row["step"]))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines([[shown(name, row[name]) if name in row else "" for name in self.columns]]))

    def _write(self, columns: Sequence[str], row: Mapping[str, float], rows: list[dict[str, str]], last: int) -> None:
        """Write the header, with the columns of a new row too, and the old rows up to a step."""
        names = dict.fromkeys([*columns, *(name for old in rows[:1] for name in old), *row])
        known = [name for name in self.order if name in names]
        self.columns = [*known, *(name for name in names if name not in known)]
        kept = [[old.get(name, "") for name in self.columns] for old in rows if float(old["step"]) <= last]
        write_text(self.path, _lines([self.columns, *kept]))


def _left_out(problem: str) -> None:
    logger.warning(f"{problem}; it is left out")


def shown(name: str, value: float) -> str:
    """A figure in a table."""
    if isinstance(value, int) or name == "step":
        return str(int(value))
    return f"{value:.2f}" if name == "seconds" else f"{value:.6g}"


def _lines(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
