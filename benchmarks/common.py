"""What benchmarks share: models of a recipe, the machine at hand, tables, JSON and plots."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ldm_dkdm import DiffusionModel, __version__  # noqa: E402
from ldm_dkdm.commands.distill import open_teacher, untrained_teacher  # noqa: E402
from ldm_dkdm.commands.evaluate import find_teacher  # noqa: E402
from ldm_dkdm.commands.hints import ScopedHints  # noqa: E402
from ldm_dkdm.commands.main import guarded  # noqa: E402, F401 - for all benchmarks
from ldm_dkdm.config.load import load_config  # noqa: E402
from ldm_dkdm.config.recipes import find_shipped  # noqa: E402
from ldm_dkdm.config.registry import build  # noqa: E402
from ldm_dkdm.config.schema import DistillRun  # noqa: E402
from ldm_dkdm.device import default_device, resolve_precision  # noqa: E402
from ldm_dkdm.distillation.make_student import make_student  # noqa: E402
from ldm_dkdm.first_stage import FIRST_STAGES  # noqa: E402
from ldm_dkdm.first_stage.codec import Codec, LatentCodec  # noqa: E402


@dataclass(frozen=True)
class Pair:
    """Teacher, student and first stage of a recipe on the device; random weights where a checkpoint is missing."""

    config: DistillRun
    teacher: DiffusionModel
    student: DiffusionModel
    codec: Codec
    device: torch.device

    def new_student(self) -> DiffusionModel:
        """Another student of the same architecture."""
        return self.student.student(self.student.node).to(self.device, self.teacher.precision)


def open_pair(recipe: str, overrides: Sequence[str] = (), precision: str = "auto") -> Pair:
    """Open what a recipe names; `RECIPE+STUDENT` takes another student's file as well."""
    config = load_config([*recipe.split("+")], overrides)
    device = default_device("auto")
    path = find_shipped(config.teacher.ckpt)
    missing = not path.exists() and config.teacher.target is not None
    teacher = untrained_teacher(config, path) if missing else open_teacher(config)
    teacher = teacher.frozen().to(device, resolve_precision(precision, device))
    student = make_student(config.student, teacher, 0).to(device, teacher.precision)
    return Pair(config, teacher, student, _codec(config, teacher, missing).to(device, teacher.precision), device)


def _codec(config: DistillRun, teacher: DiffusionModel, missing: bool) -> Codec:
    if missing and config.first_stage.target is not None:
        return LatentCodec(build(config.first_stage, FIRST_STAGES, "first_stage.params"))
    return teacher.codec()


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each variant; every round runs all of them in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            synchronise(device)
            started = time.perf_counter()
            variant()
            synchronise(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronise(device: torch.device) -> None:
    """Wait for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: torch.device) -> dict[str, Any]:
    """What figures depend on: the device's name, threads, versions."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    versions = {"torch": torch.__version__, "ldm_dkdm": __version__}
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    shown = [[f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *shown)]
    lines = [keys, ["-" * width for width in widths], *shown]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def measuring_parser(meaning: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark that measures the students of several distillations."""
    parser = argparse.ArgumentParser(description=meaning.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--count", type=int, default=2000, help="images of each model")
    parser.add_argument("-c", "--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("-o", "--out", type=Path, help="JSON file; a plot is written beside it")
    return parser


def teacher_of(run: Path, teacher: str | None = None) -> DiffusionModel:
    """The teacher that is named, else the one of a run's distillation."""
    return find_teacher(run, teacher, ScopedHints([], ("student", "teacher")))


def finish(out: Path | None, device: torch.device, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Print the rows and write them as JSON with the machine and the facts that they depend on."""
    print(table(rows))
    if out is not None:
        write(out, device, **facts, rows=list(rows))
        print(out)


def write(out: Path, device: torch.device, **figures: Any) -> None:
    """Write figures as JSON with the machine that they are from."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**figures, "machine": machine(device)}, indent=2) + "\n")


def plot(path: Path, draw: Callable[[Any], None], x: str, y: str, title: str) -> None:
    """Write a PNG that `draw` fills, given matplotlib's axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    draw(axes)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(path)
