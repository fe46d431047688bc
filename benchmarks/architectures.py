"""Speed and distance of students of several architectures (Fig. 6): python benchmarks/architectures.py RUN [RUN ...]

Each run's student is timed in turn with the teacher while it samples 256 images, as in the paper, and measured
against the teacher's samples. RUN may be any model; `--teacher` then names the teacher.
"""

from pathlib import Path

from common import finish, guarded, interleaved, measuring_parser, plot, teacher_of

import ldm_dkdm as dkdm
from ldm_dkdm.device import default_device


def main() -> None:
    """Time, measure, print."""
    parser = measuring_parser(__doc__)
    parser.add_argument("--teacher", help="default: the one of the first run")
    parser.add_argument("-n", "--images", type=int, default=256, help="images that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="32", choices=["auto", "bf16", "32"])
    options = parser.parse_args()
    device = default_device("auto")
    teacher = teacher_of(options.runs[0], options.teacher)
    models = {"teacher": teacher} | {run.name: dkdm.load_model(run) for run in options.runs}
    models = {name: model.to(device, options.precision) for name, model in models.items()}
    size = min(options.images, 256)
    work = {
        name: lambda model=model: model.sample(options.images, steps=options.steps, batch_size=size)
        for name, model in models.items()
    }
    seconds = interleaved(work, options.rounds, device)
    rows = []
    for name, model in models.items():
        found = dkdm.measure(
            model, teacher, metrics=["fd"], features=options.features, count=options.count, steps=options.steps
        )
        rate = {"M parameters": model.parameters / 1e6, "images/s": options.images / seconds[name]}
        rows.append({"model": name, **rate, **found.figures})
    facts = {"what": "speed and distance (Fig. 6)", "images": options.images, "steps": options.steps}
    finish(options.out, device, rows, **facts, count=options.count, precision=options.precision)
    if options.out:
        draw(rows, options.out.with_suffix(".png"))


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Distance against speed, the area of a point in proportion to the number of parameters."""
    distance = list(rows[0])[-1]

    def points(axes: object) -> None:
        for row in rows:
            place = (row["images/s"], row[distance])
            axes.scatter(*place, s=20 * row["M parameters"], alpha=0.6, label=f"{row['model']}")
            axes.annotate(f"{row['M parameters']:.1f} M", place, textcoords="offset points", xytext=(6, 6))

    plot(path, points, "images/s", f"{distance} to the teacher", "Speed and distance (Fig. 6)")


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
