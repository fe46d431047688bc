"""Does the agreement rank students as a distance does? python benchmarks/ranking.py RUN [RUN ...]

Reads the last agreement of every distillation from its metrics.csv, measures its student against its teacher, and
prints Spearman's rank correlation of the two over the runs.
"""

from pathlib import Path

from common import finish, measuring_parser, plot, teacher_of
from scipy.stats import spearmanr

import ldm_dkdm as dkdm
from ldm_dkdm.device import default_device
from ldm_dkdm.errors import UserError
from ldm_dkdm.reports.tables import read_series


def main() -> None:
    """Measure, rank, print."""
    parser = measuring_parser(__doc__)
    options = parser.parse_args()
    numbers = {"metrics": ["fd"], "features": options.features, "count": options.count, "steps": options.steps}
    rows, name = [], ""
    for run in options.runs:
        teacher = teacher_of(run)
        ((name, distance),) = dkdm.measure(dkdm.load_model(run), teacher, **numbers).figures.items()
        rows.append({"run": run.name, "agreement": last_agreement(run), name: distance})
    correlation = rank_correlation([row["agreement"] for row in rows], [row[name] for row in rows])
    facts = {"what": "agreement and distance of students", "spearman": correlation, "count": options.count}
    finish(options.out, default_device("auto"), rows, **facts, steps=options.steps)
    print(f"Spearman's rank correlation over {len(rows)} runs: {correlation:.3f}")
    if options.out:
        x, y = [row["agreement"] for row in rows], [row[name] for row in rows]
        title = f"rank correlation {correlation:.2f}"
        plot(options.out.with_suffix(".png"), lambda axes: axes.scatter(x, y, label="runs"), "agreement", name, title)


def last_agreement(run: Path) -> float:
    """The last agreement in a run's metrics.csv, mean squared eps error.

    Raises:
        UserError: it was not measured.
    """
    file = run / "metrics.csv"
    measured = read_series([file] if file.is_file() else []).get("agreement")
    if measured is None:
        raise UserError(f"{file}: holds no agreement; the run needs logging.evaluate_every")
    return measured.values[-1]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; NaN for fewer than two runs."""
    return float(spearmanr(x, y).statistic) if len(x) > 1 else float("nan")


if __name__ == "__main__":
    main()
