"""Device and host memory against rho (Fig. 7): python benchmarks/memory.py quickstart --rho 0.4 1 4

Every size of the pool is measured in a process of its own, after a few iterations at the recipe's batch size; training
on data, which encodes its images in every iteration, for comparison.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from common import Pair, finish, guarded, open_pair, plot
from training_speed import BATCHES, Training, encoded, on_data

from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.pool import NoisyPool, pool_slots
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.records import NoisyBatch

STEPS = 3


def measure(recipe: str, batch_size: int | None, rho: float | None, storage: Path | None) -> dict[str, object]:
    """Peak memory of a few iterations; `rho` None: on data."""
    pair = open_pair(recipe)
    size = batch_size or pair.config.distill.batch_size
    stream = DataStream(encoded(pair), **on_data(pair, size)) if rho is None else distillation(pair, size, rho, storage)
    training = Training(pair, stream)
    for _ in range(STEPS):
        training.iteration()
    on_gpu = pair.device.type == "cuda"
    pool = 0 if rho is None else stream.pool.x.numel() * stream.pool.x.element_size()
    return {
        "rho": "on data" if rho is None else rho,
        "pool GB": pool / 1e9,
        "device GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
        "host GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def distillation(pair: Pair, batch_size: int, rho: float, storage: Path | None) -> DistillStream:
    """A stream on a pool of the size that rho asks for, filled with noise."""
    teacher, slots = pair.teacher, pool_slots(rho, pair.teacher.schedule.num_timesteps, batch_size)
    dtype = getattr(torch, pair.config.distill.pool_dtype)
    pool = NoisyPool(slots, teacher.shape, dtype, storage, labeled=teacher.num_classes is not None)
    for part in torch.arange(slots).split(4096):
        labels = teacher.draw_labels(len(part), torch.Generator(pair.device).manual_seed(0))
        t = torch.randint(teacher.schedule.num_timesteps, (len(part),))
        pool.fill(NoisyBatch(torch.randn(len(part), *teacher.shape), t, labels))
    config = replace(pair.config.distill, batch_size=batch_size)
    return DistillStream(teacher, pool, config, BATCHES, device=pair.device)


def in_own_process(recipe: str, batch_size: int | None, rho: float | None, storage: Path | None) -> dict[str, object]:
    """`measure` in a new process, whose peak is its own."""
    command = [sys.executable, __file__, recipe, "--one", "data" if rho is None else str(rho)]
    command += ["--batch_size", str(batch_size)] if batch_size else []
    command += ["--storage", str(storage)] if storage else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Measure every rho, or one of them for `in_own_process`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="quickstart", help="RECIPE or RECIPE+STUDENT")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.1, 0.4, 1, 2, 4])
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--storage", type=Path, help="map the pool to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path, help="JSON file; a plot is written beside it")
    options = parser.parse_args()
    if options.one:
        rho = None if options.one == "data" else float(options.one)
        print(json.dumps(measure(options.recipe, options.batch_size, rho, options.storage)))
        return
    rows = [in_own_process(options.recipe, options.batch_size, rho, options.storage) for rho in [None, *options.rho]]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"what": "peak memory (Fig. 7)", "recipe": options.recipe, "mapped": options.storage is not None}
    finish(options.out, device, rows, **facts)
    if options.out:
        draw(rows, options.out.with_suffix(".png"), options.recipe)


def draw(rows: list[dict[str, object]], path: Path, recipe: str) -> None:
    """Memory against rho; training on data as a line."""

    def lines(axes: object) -> None:
        for name, colour in (("device GB", "C0"), ("host GB", "C1")):
            axes.plot([row["rho"] for row in rows[1:]], [row[name] for row in rows[1:]], f"{colour}o-", label=name)
            axes.axhline(rows[0][name], color=colour, linestyle=":", label=f"{name}, on data")
        axes.set_ylim(bottom=0)

    plot(path, lines, "rho", "GB", f"Peak memory of {recipe} (Fig. 7)")


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
