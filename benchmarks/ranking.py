"""Does the agreement rank students as a distance does? python benchmarks/ranking.py MODEL [MODEL ...]

A MODEL is the run folder of a distillation, or one of its checkpoints (RUN/checkpoints/step=N.ckpt, kept by
`logging.keep_every`), whose agreement is in the run's metrics.csv. Measures each student against its teacher, and
prints Spearman's rank correlation of the agreement with the distances, over all of them and for each teacher.
"""

import re
from pathlib import Path
from typing import Any

from common import finish, guarded, measuring_parser, plot, teacher_of
from scipy.stats import spearmanr

import ldm_dkdm as dkdm
from ldm_dkdm.device import default_device
from ldm_dkdm.errors import UserError
from ldm_dkdm.reports.tables import read_series

AGREEMENT = "agreement"


def main() -> None:
    """Measure, rank, print."""
    options = measuring_parser(__doc__).parse_args()
    rows = [row_of(model, options) for model in options.runs]
    distances = [name for name in rows[0] if name not in ("model", "teacher", AGREEMENT)]
    teachers = dict.fromkeys(row["teacher"] for row in rows)
    groups = {"all": rows} | {teacher: [row for row in rows if row["teacher"] == teacher] for teacher in teachers}
    correlations = {
        name: {group: rank_correlation(column(own, AGREEMENT), column(own, name)) for group, own in groups.items()}
        for name in distances
    }
    facts = {"what": "agreement and distance of students", "spearman": correlations, "count": options.count}
    finish(options.out, default_device("auto"), rows, **facts, steps=options.steps)
    for name, found in correlations.items():
        for group, value in found.items():
            print(f"Spearman's rank correlation of agreement and {name}, {group} ({len(groups[group])}): {value:.3f}")
    if options.out:
        draw(rows, distances[0], options.out.with_suffix(".png"))


def row_of(model: Path, options: Any) -> dict[str, Any]:
    """Agreement and distances of a student."""
    run = run_of(model)
    teacher = teacher_of(run)
    numbers = {"features": options.features, "count": options.count, "steps": options.steps, "progress": True}
    found = dkdm.measure(dkdm.load_model(model), teacher, metrics=["fd", "pixel-frechet"], **numbers)
    named = {"model": str(model.relative_to(run.parent)), "teacher": str(teacher.path)}
    return {**named, AGREEMENT: agreement_of(model), **found.figures}


def run_of(model: Path) -> Path:
    """The run folder of a checkpoint; a run folder itself."""
    return model.parents[1] if model.suffix == ".ckpt" else model


def agreement_of(model: Path) -> float:
    """The agreement in a run's metrics.csv, mean squared eps error: at a checkpoint's step, or the last one.

    Raises:
        UserError: it was not measured.
    """
    file, step = run_of(model) / "metrics.csv", re.fullmatch(r"step=(\d+)", model.stem)
    measured = read_series([file] if file.is_file() else []).get(AGREEMENT)
    if measured is None:
        raise UserError(f"{file}: holds no agreement; the run needs logging.evaluate_every")
    if step is None:
        return measured.values[-1]
    if int(step[1]) not in measured.steps:
        raise UserError(f"{file}: holds no agreement at step {int(step[1])}, that of {model.name}")
    return measured.values[measured.steps.index(int(step[1]))]


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    """The figures of a name."""
    return [row[name] for row in rows]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; NaN for fewer than two students."""
    return float(spearmanr(x, y).statistic) if len(x) > 1 else float("nan")


def draw(rows: list[dict[str, Any]], distance: str, path: Path) -> None:
    """A point for every student, a colour for every teacher."""

    def points(axes: Any) -> None:
        for teacher in dict.fromkeys(row["teacher"] for row in rows):
            own = [row for row in rows if row["teacher"] == teacher]
            axes.scatter(column(own, AGREEMENT), column(own, distance), label=Path(teacher).name)
        axes.set(xscale="log", yscale="log")

    plot(path, points, AGREEMENT, distance, "agreement and distance to the teacher")


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
