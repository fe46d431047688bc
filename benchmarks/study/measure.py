"""Measure a run of the study, or a teacher beside itself: python benchmarks/study/measure.py RUN TEACHER [DATA]

`floor TEACHER OUT [DATA]` in place of the run writes the teacher's figures with other seeds to OUT, `many MODEL TEACHER
OUT` the distances of a model by as many samples as the plan's `many`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plan import read_plan

import ldm_dkdm as dkdm
from ldm_dkdm.commands.evaluate import find_teacher, run_of
from ldm_dkdm.commands.hints import ScopedHints
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.schema import DiffusionRun, DistillRun
from ldm_dkdm.distillation.pool import pool_slots
from ldm_dkdm.distillation.replay import calls_for
from ldm_dkdm.distillation.stream import VARIANTS
from ldm_dkdm.distillation.warmup import preparation, warmup_calls

PRIMED = ("FD", "KID", "pixel")  # distances to the teacher's samples


def main() -> None:
    """Write what the arguments ask for."""
    if sys.argv[1] == "floor":
        measure_floor(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    elif sys.argv[1] == "many":
        measure_many(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        measure_run(Path(sys.argv[1]), sys.argv[2], sys.argv[3])


def measure_floor(teacher_path: str, out: Path, data: str) -> None:
    """Write the distances of a teacher's samples to samples of its own with other seeds, and to the data."""
    options = dict(read_plan()["measured"])
    options["metrics"] = [name for name in options["metrics"] if name != "agreement"]
    teacher = dkdm.load_model(teacher_path)
    found = dkdm.measure(dkdm.load_model(teacher_path), teacher, progress=True, **options).figures
    figures = primed(found) | distance_to(data, teacher)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"figures": figures}, indent=2) + "\n")


def measure_many(path: str, teacher: str, out: Path) -> None:
    """Write the distances of a model's samples to a teacher's, many of each; the model may be the teacher itself."""
    plan = read_plan()
    options = {**plan["measured"], "count": plan["many"]["count"], "metrics": plan["many"]["metrics"]}
    found = dkdm.measure(dkdm.load_model(path), dkdm.load_model(teacher), progress=True, **options).figures
    figures = {f"{name} (many)": value for name, value in primed(found).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"figures": figures}, indent=2) + "\n")


def distance_to(data: str, model: dkdm.DiffusionModel) -> dict[str, Any]:
    """A model's Frechet distance to the data; empty without any."""
    if not data:
        return {}
    numbers = {name: value for name, value in read_plan()["measured"].items() if name != "metrics"}
    return dict(dkdm.measure(model, data, metrics=["fd"], progress=True, **numbers).figures)


def primed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with a prime at the distances to a teacher."""
    return {f"{name}'" if name.startswith(PRIMED) else name: value for name, value in found.items()}


def measure_run(run: Path, teacher_path: str, data: str) -> None:
    """Write RUN/study.json: figures against the teacher, against the data, and the teacher's calls."""
    options = read_plan()["measured"]
    config = run_of(run)
    hints = ScopedHints([], ("student", "teacher"))
    student, teacher = dkdm.load_model(run), find_teacher(run, None if config else teacher_path, hints)
    found = dkdm.measure(student, teacher, progress=True, **options).figures
    figures = primed(found)
    figures.pop("eps_mse_by_t", None)
    figures |= distance_to(data, student)
    calls = calls_of(config, teacher) if config else calls_for_samples(run)
    written = {"figures": figures, "parameters": student.parameters, "calls": calls, "ldm_dkdm": dkdm.__version__}
    (run / "study.json").write_text(json.dumps(written, indent=2) + "\n")


def calls_for_samples(run: Path) -> dict[str, int]:
    """Teacher evaluations of one sample that made the synthetic images of a training; empty without any."""
    synthetic = load_config(run / "config.yaml", schema=DiffusionRun).data.synthetic
    made = {entry["makes"]: entry.get("calls", 0) for entry in read_plan()["prepared"].values()}
    return {"training": 0, "samples": made[synthetic]} if synthetic else {}


def calls_of(config: DistillRun, teacher: dkdm.DiffusionModel) -> dict[str, int]:
    """Teacher evaluations of one sample, of the training and of the preparation of its pool."""
    method, steps = config.distill, config.trainer.max_steps * config.trainer.accumulate
    slots = method.batch_size
    if VARIANTS[method.variant].expands:
        assert method.rho is not None  # a run has been made
        slots = pool_slots(method.rho, teacher.schedule.num_timesteps, slots)
    training = round(calls_for(steps, method.replay) / (1 - method.discard)) * method.batch_size
    return {"training": training, "warm-up": warmup_calls(preparation(method), slots, teacher.schedule)}


if __name__ == "__main__":
    main()
