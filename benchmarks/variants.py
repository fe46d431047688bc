"""Compare the three ways to make batches: python benchmarks/variants.py configs/digits.yaml -o docs/variants.png

Distils with each variant for the same number of steps from one seed, measures the students' eps error on
held-out exact chains of the teacher, and plots the training losses.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
COLORS = {"iterative": "#c0392b", "shuffled": "#e0a030", "dynamic": "#2060c0"}
WIDTH, HEIGHT, MARGIN = 900, 480, 60


def main() -> None:
    """Run, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    curves = {}
    for variant in COLORS:
        run = Path("logs") / f"variants-{variant}"
        override = [
            f"distill.variant={variant}",
            f"trainer.max_steps={arguments.steps}",
            f"logging.name={run.name}",
            "logging.log_every=10",
        ]
        call("dkdm_ldm.py", "--base", arguments.base, *override, f"logging.save_every={arguments.steps}")
        call("evaluate.py", "-r", run, "-n", 0, "--chains", 8)
        figures = json.loads((run / "student" / "evaluation.json").read_text())
        errors = ", ".join(f"{figures[f'agreement_q{quarter}']:.3g}" for quarter in range(1, 5))
        print(f"{variant}: eps error per t-quarter {errors}")
        curves[variant] = losses(run)
    draw(curves, arguments.out)
    print(arguments.out)


def call(script: str, *arguments: object) -> None:
    """Run one of the package's scripts."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)], check=True)


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, mean loss of the steps up to it) of a run."""
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row["loss"]]


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot the curves on a logarithmic scale, with labels."""
    font = ImageFont.load_default(size=16)
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)
    last = max(step for curve in curves.values() for step, _ in curve)
    values = [math.log10(value) for curve in curves.values() for _, value in curve]
    low, high = math.floor(min(values)), math.ceil(max(values))

    def place(step: float, log: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (log - low) / (high - low)

    for power in range(low, high + 1):
        pen.line([place(0, power), place(last, power)], fill="#dddddd")
        pen.text((8, place(0, power)[1] - 8), f"1e{power}", fill="black", font=font)
    for tick in range(0, last + 1, max(1, last // 5)):
        pen.text((place(tick, low)[0] - 12, HEIGHT - MARGIN + 8), str(tick), fill="black", font=font)
    pen.text((WIDTH // 2 - 80, HEIGHT - 26), "training steps", fill="black", font=font)
    pen.text((MARGIN, 12), "loss, mean of 10 steps", fill="black", font=font)
    for i, (variant, curve) in enumerate(curves.items()):
        pen.line([place(step, math.log10(value)) for step, value in curve], fill=COLORS[variant], width=3)
        pen.text((WIDTH - MARGIN - 110, 12 + 20 * i), variant, fill=COLORS[variant], font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    main()
