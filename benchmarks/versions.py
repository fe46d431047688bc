"""Steps a second of another version beside ours: python benchmarks/versions.py OLD quickstart cifar10 ffhq256

OLD is a checkout of this repository (`git worktree add ../old TAG`), whose recipes both versions train, in turns in
one call: whole runs, with the trainer's loop, of a teacher with random weights where the recipe's is missing. The first
steps of a run are slower and do not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import ROOT, finish, guarded
from full_size import write_teacher

from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.recipes import find_shipped
from ldm_dkdm.device import default_device
from ldm_dkdm.errors import UserError

SLOWER = 3  # steps at the start that do not count
QUICK = (  # no preparation, no figures, no grids
    "distill.warmup.mode=noise",
    "distill.warmup.t_cap=null",
    "distill.rho=0.01",
    "teacher.check=false",
    "trainer.max_minutes=null",
    "logging.sample_every=1000000",
    "logging.save_every=1000000",
)

TIMED = """
import json, os, runpy, time
from torch.optim.optimizer import register_optimizer_step_post_hook
times = []
register_optimizer_step_post_hook(lambda *given: times.append(time.perf_counter()))
try:
    runpy.run_path("scripts/dkdm_ldm.py", run_name="__main__")
finally:
    with open(os.environ["TIMES"], "w") as file:
        json.dump(times, file)
"""  # a version's script, and when its optimizer has made each step


def main() -> None:
    """Train the recipes with both versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="NAME, or NAME=BATCH for another batch size")
    parser.add_argument("--steps", type=int, default=20, help="steps that count, of each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides for both")
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    options = parser.parse_args()
    old = options.old.resolve()
    if not (old / "scripts" / "dkdm_ldm.py").is_file():
        raise UserError(f"OLD: {old} is not a checkout of this repository")
    with tempfile.TemporaryDirectory() as folder:
        rows = [row_of(word, old, Path(folder), options) for word in options.recipes]
    facts = {"what": "steps a second of two versions", "old": revision(old), "rounds": options.rounds}
    finish(options.out, default_device("auto"), rows, **facts)


def revision(checkout: Path) -> str:
    """The commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()


def row_of(word: str, old: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A recipe's steps a second in both versions: medians over rounds."""
    name, _, batch = word.partition("=")
    recipe = old / "configs" / f"{name}.yaml"
    words = [*options.set, *([f"distill.batch_size={batch}"] if batch else []), *teacher_words(str(recipe), folder)]
    rates: dict[str, list[float]] = {"old": [], "new": []}
    for number in range(options.rounds):
        for version, checkout in {"old": old, "new": ROOT}.items():
            place = folder / f"{word}-{number}-{version}"
            rates[version].append(rate_of(checkout, recipe, words, place, options.steps))
    before, now = (statistics.median(found) for found in rates.values())
    return {"recipe": name, "batch": batch or "recipe's", "old": before, "new": now, "ratio": now / before}


def teacher_words(recipe: str, folder: Path) -> list[str]:
    """Overrides for a recipe whose teacher is missing: one with random weights, in the format of the missing file."""
    config = load_config([recipe])
    if find_shipped(config.teacher.ckpt).exists():
        return []
    place = folder / f"teacher-{Path(recipe).stem}"
    if not place.exists():
        place.mkdir()
        write_teacher(config, place)
    return [f"teacher.ckpt={next(place.iterdir())}"]


def rate_of(checkout: Path, recipe: Path, words: list[str], run: Path, steps: int) -> float:
    """Steps a second of a run: the median over its last steps.

    Raises:
        UserError: the run has failed; its last line.
    """
    place = [f"trainer.max_steps={steps + SLOWER}", f"logging.dir={run.parent}", f"logging.name={run.name}"]
    command = [sys.executable, "-c", TIMED, "--base", str(recipe), *QUICK, *words, *place]
    times = run.with_suffix(".json")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "TIMES": str(times)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise UserError(f"{checkout}: {lines[-1]}")
    seconds = json.loads(times.read_text())[-steps - 1 :]
    return 1 / statistics.median(later - earlier for earlier, later in pairwise(seconds))


if __name__ == "__main__":
    guarded(main, "name a smaller batch: NAME=BATCH")
