"""Run folders as trainings leave them, without a training; copies of those of a training."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.cli import write_yaml

QUARTERS = tuple(f"agreement_q{i}" for i in range(1, 5))
LOSSES = ("loss", "eps_mse", "vlb", "learning_rate")
COLUMNS = ("step", "seconds", "steps_per_second", *LOSSES, "agreement", *QUARTERS, "x0_drift", "psnr", "ssim")
CONFIG = {
    "teacher": {"ckpt": "models/teacher"},
    "student": {"target": "ldm_dkdm.networks.UNet"},
    "trainer": {"max_steps": 100, "learning_rate": 0.001},
}
CARD = {"weights": "student.safetensors", "info": {"step": 100}, "network": {"target": "ldm_dkdm.networks.UNet"}}
CURVE = {"0": 0.5, "25": 0.2, "50": 0.1, "75": 0.05}
FIGURES = {"eps_mse_by_t": CURVE, "eps_mse_by_t_quarter": [0.5, 0.25], "student_parameters": 7}
RECORD = {  # what dkdm evaluate writes with a reference
    "figures": {"FID": 12.5, "IS": None},
    "samples": {"source": "run", "sampler": "ddim", "steps": 20},
    "reference": {"source": "emoji"},
    "features": [{"features": "inception", "weights_sha256": "ab12"}],
    "warnings": ["5 samples", "JPEG"],
}
TEXT = "---\ntags: [x]\n---\n\n# My student\n\n- **teacher**: models/teacher\n"

Table = Sequence[Mapping[str, object]]


def rows_to(last: int, every: int = 10, measured_every: int = 50) -> list[dict[str, object]]:
    """Rows of metrics.csv at 2 steps a second; the loss falls as 1/step, the agreement is measured now and then."""
    rows: list[dict[str, object]] = []
    for step in range(every, last + 1, every):
        row: dict[str, object] = {"step": step, "seconds": step / 2, "steps_per_second": 2.0, "loss": 1 / step}
        if step % measured_every == 0:
            row |= {"agreement": 2 / step, **{name: i / step for i, name in enumerate(QUARTERS, 1)}}
        rows.append(row)
    return rows


def pool_to(last: int) -> list[dict[str, object]]:
    """Rows of pool.csv: 5 slots in each of the lower half of the bins, 15 in each of the upper."""
    counts = {f"t_{i:02d}": 5 if i < 10 else 15 for i in range(20)}
    ages = {"age_mean": 4.5, "age_p50": 4, "age_p90": 9, "age_max": 12}
    return [{"step": step, **counts, **ages} for step in range(10, last + 1, 10)]


def write_table(path: Path, rows: Table, columns: Sequence[str] | None = None) -> Path:
    """A CSV file; cells that a row does not have are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, tree: object) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


def write_png(path: Path, seed: int, side: int = 34) -> np.ndarray:
    """A PNG of noise; its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def begun(path: Path, **config: object) -> Path:
    """A run folder with nothing but its config."""
    write_yaml(path / "config.yaml", {**CONFIG, **config})
    return path


def finished(path: Path, steps: int = 100, teacher: int | None = 0, **config: object) -> Path:
    """A run with everything: tables, grids at 50 and 100, the teacher's samples, figures, a card."""
    begun(path, **config)
    write_table(path / "metrics.csv", rows_to(steps), COLUMNS)
    write_table(path / "pool.csv", pool_to(steps))
    for step in range(50, steps + 1, 50):
        write_png(path / "samples" / f"step={step:08d}.png", step)
    if teacher is not None:
        write_png(path / "samples" / "teacher.png", teacher)
    write_yaml(path / "student" / "config.yaml", CARD)
    write_json(path / "student" / "evaluation.json", FIGURES)
    write_json(path / "student" / "evaluations" / f"emoji-{steps}.json", RECORD)
    (path / "student" / "README.md").write_text(TEXT)
    return path


def copied(run: Path, logs: Path) -> Path:
    """A copy of a run as logs/<its name>, whose config names that folder."""
    copy = Path(shutil.copytree(run, logs / run.name))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(f"dir: {run.parent}\n", f"dir: {logs}\n"))
    return copy
