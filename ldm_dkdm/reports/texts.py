"""The tables and cards of a page, as plain text; the template escapes it."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_dkdm.reporting import duration
from ldm_dkdm.reports.charts import time_left
from ldm_dkdm.reports.model_figures import shown
from ldm_dkdm.reports.run_files import RunFiles

Rows = list[tuple[str, list[str]]]  # (label, a text per run)
_FRONT_MATTER = re.compile(r"\A---\n.*?^---\n", re.M | re.S)
_MARKS = (("heading", re.compile(r"#+ +(.*)")), ("item", re.compile(r"[-*] +(.*)")))


def names_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def facts_of(run: RunFiles) -> dict[str, str]:
    """What the head of a page says of a run: how far it is, how fast, how good."""
    done, total = _last_step(run), run.keys.get("trainer.max_steps")
    facts = {"Steps": f"{done:,} of {total:,}" if isinstance(total, int) else f"{done:,}"}
    facts |= {"Training time": duration(run.series["seconds"].values[-1])} if "seconds" in run.series else {}
    if "steps_per_second" in run.series:
        facts["Steps per second, last"] = f"{run.series['steps_per_second'].values[-1]:.3g}"
    left = time_left(run)
    if left is not None and left.values and left.values[-1] >= 1:
        facts["Time left when it last wrote"] = duration(left.values[-1])
    for column, label in (("loss", "Loss"), ("agreement", "eps error on held-out chains")):
        if column in run.series:
            facts |= _first_last_best(label, run.series[column].values)
    models = {"teacher.ckpt": "Teacher", "student.target": "Student", "model.target": "Model"}
    return facts | {label: shown(run.keys[key]) for key, label in models.items() if run.keys.get(key)}


def _first_last_best(label: str, values: Sequence[float]) -> dict[str, str]:
    return {f"{label}, first, lowest, last": f"{values[0]:.4g}, {min(values):.4g}, {values[-1]:.4g}"}


def _last_step(run: RunFiles) -> int:
    written = [series.steps[-1] for series in run.series.values() if series.steps]
    return max([run.saved_step, *written, *(grid.step for grid in run.grids)])


def rows_of(columns: Sequence[Mapping[str, str]]) -> Rows:
    """A table with a column per run, in the order in which the labels come first."""
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label, "") for column in columns]) for label in labels]


def differences_of(runs: Sequence[RunFiles]) -> Rows:
    """The keys of the configs whose values are not the same in all runs."""
    rows = rows_of([{key: _value(value) for key, value in run.keys.items()} for run in runs])
    return [(label, values) for label, values in rows if len(set(values)) > 1]


def _value(value: object) -> str:
    return "null" if value is None else shown(value)


def blocks_of(card: str) -> list[tuple[str, list[str]]]:
    """A card in Markdown as (kind, lines): heading, item or text; neighbours of one kind together."""
    lines = [line.strip() for line in _FRONT_MATTER.sub("", card).splitlines() if line.strip()]
    marked = [_marked(line) for line in lines]
    return [(kind, [text for _, text in group]) for kind, group in itertools.groupby(marked, lambda pair: pair[0])]


def _marked(line: str) -> tuple[str, str]:
    plain = line.replace("**", "")
    return next(((kind, found[1]) for kind, mark in _MARKS if (found := mark.fullmatch(plain))), ("text", plain))
