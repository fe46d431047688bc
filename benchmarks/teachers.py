"""Students against their teachers (Fig. 10): python benchmarks/teachers.py RUN [RUN ...] --reference IMAGES

Each RUN is a distillation. Its student and its teacher are measured against the same reference, and a line is fitted
through the pairs.
"""

from pathlib import Path

import numpy as np
from common import finish, guarded, measuring_parser, plot, teacher_of

import ldm_dkdm as dkdm
from ldm_dkdm.device import default_device


def main() -> None:
    """Measure, fit, print."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--reference", required=True, help="folder of images, .npz, statistics or a model")
    options = parser.parse_args()
    numbers = {"metrics": ["fd"], "features": options.features, "count": options.count, "steps": options.steps}
    rows, name = [], ""
    for run in options.runs:
        teacher = teacher_of(run)
        row = {"run": run.name}
        for role, model in (("teacher", teacher), ("student", dkdm.load_model(run))):
            ((name, value),) = dkdm.measure(model, options.reference, **numbers).figures.items()
            row[role] = value
        rows.append(row)
    fit = line([row["teacher"] for row in rows], [row["student"] for row in rows])
    facts = {"what": f"{name} of students and teachers (Fig. 10)", "reference": options.reference, **fit}
    finish(options.out, default_device("auto"), rows, **facts)
    print(", ".join(f"{key} {value:.3g}" for key, value in fit.items()))
    if options.out:
        draw(rows, fit, name, options.out.with_suffix(".png"))


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares: y = slope x + intercept, and the correlation; nothing for fewer than two teachers."""
    if len(set(x)) < 2:
        return {}
    slope, intercept = np.polyfit(x, y, 1)
    return {"slope": float(slope), "intercept": float(intercept), "correlation": float(np.corrcoef(x, y)[0, 1])}


def draw(rows: list[dict[str, object]], fit: dict[str, float], name: str, path: Path) -> None:
    """A point for every pair, and the line."""

    def points(axes: object) -> None:
        x = np.array([row["teacher"] for row in rows])
        axes.scatter(x, [row["student"] for row in rows], label="pairs")
        if fit:
            label = f"{fit['slope']:.2f} x + {fit['intercept']:.2f}, r = {fit['correlation']:.2f}"
            axes.plot(x, fit["slope"] * x + fit["intercept"], label=label)

    plot(path, points, f"teacher's {name}", f"student's {name}", "Students against their teachers (Fig. 10)")


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
