"""A CSV file that is appended to row by row, and stays one table through crashes and resumes."""

import csv
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from ldm_dkdm.files import replacing
from ldm_dkdm.reporting import logger
from ldm_dkdm.reports.tables import read_cells

NAMED = 10  # damaged lines that warnings name


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
        self._damaged = 0  # lines that were left out

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row; columns that it does not have stay empty."""
        if not self.columns:
            self._write([name for name in self.order if name not in self.optional], row, self.resumed_at)
        elif not row.keys() <= set(self.columns):
            self._write(self.columns, row, int(row["step"]))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(
                shown(name, row[name]) if name in row else "" for name in self.columns
            )

    def _write(self, columns: Sequence[str], row: Mapping[str, float], last: int) -> None:
        """Write the header, with the columns of a new row too, and the old rows up to a step, one after the other."""
        rows = read_cells(self.path, self._left_out)
        first = next(rows, None)
        names = dict.fromkeys([*columns, *(first or {}), *row])
        known = [name for name in self.order if name in names]
        self.columns = [*known, *(name for name in names if name not in known)]
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            for old in chain([first] if first else [], rows):
                if float(old["step"]) <= last:
                    writer.writerow(old.get(name, "") for name in self.columns)

    def _left_out(self, problem: str) -> None:
        """Warn of a damaged line; of a file with many, the first ones are named."""
        self._damaged += 1
        if self._damaged <= NAMED:
            logger.warning(f"{problem}; it is left out")
        elif self._damaged == NAMED + 1:
            logger.warning(f"{self.path}: more lines are damaged; all are left out")


def shown(name: str, value: float) -> str:
    """A figure in a table."""
    if isinstance(value, int) or name == "step":
        return str(int(value))
    return f"{value:.2f}" if name == "seconds" else f"{value:.6g}"
