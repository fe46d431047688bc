"""One process with all threads beside processes that share them: python benchmarks/processes.py quickstart

Whole runs of a recipe in turns on the CPU, the recipe's batch shared by the processes; steps a second after the first
ones, from metrics.csv.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, guarded
from versions import QUICK

from ldm_dkdm.config.load import load_config
from ldm_dkdm.errors import UserError
from ldm_dkdm.reports.tables import read_series

SLOWER = 10  # steps at the start that do not count


def main() -> None:
    """Train a recipe with both, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=60, help="steps of a run that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if options.processes < 2:
        raise UserError("processes: at least 2")
    threads = {1: options.processes, options.processes: 1}
    rates: dict[int, list[float]] = {processes: [] for processes in threads}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for processes, each in threads.items():
                place = Path(folder) / f"{number}-{processes}"
                rates[processes].append(rate_of(options.recipe, processes, each, place, options.steps))
    rows = [row_of(options.recipe, processes, threads[processes], rates) for processes in threads]
    finish(options.out, torch.device("cpu"), rows, what="steps a second of processes", rounds=options.rounds)


def row_of(recipe: str, processes: int, threads: int, rates: dict[int, list[float]]) -> dict[str, Any]:
    """Steps a second with so many processes, and their ratio to those of one: medians over rounds."""
    rate = statistics.median(rates[processes])
    shared = {"recipe": recipe, "processes": processes, "threads of each": threads, "steps/s": rate}
    return {**shared, "ratio": rate / statistics.median(rates[1])}


def share_of(recipe: str, processes: int) -> list[str]:
    """Overrides with which so many processes make the recipe's batch together, on the CPU.

    Raises:
        UserError: they do not divide it.
    """
    batch = load_config([recipe]).distill.batch_size
    if batch % processes:
        raise UserError(f"processes: {processes} do not divide the recipe's batch of {batch}")
    return [f"trainer.devices={processes}", f"distill.batch_size={batch // processes}", "trainer.accelerator=cpu"]


def rate_of(recipe: str, processes: int, threads: int, run: Path, steps: int) -> float:
    """Steps a second of a run.

    Raises:
        UserError: the run has failed; its last line.
    """
    place = [f"logging.dir={run.parent}", f"logging.name={run.name}", "logging.log_every=1", "logging.evaluate_every=0"]
    words = [*QUICK, "distill.rho=0.1", *share_of(recipe, processes), f"trainer.max_steps={steps + SLOWER}", *place]
    command = [sys.executable, "-m", "ldm_dkdm", "distill", "--base", recipe, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["no output"])[-1])
    seconds = read_series([run / "metrics.csv"])["seconds"].values
    return steps / (seconds[-1] - seconds[-1 - steps])


if __name__ == "__main__":
    guarded(main, "name fewer --processes")
