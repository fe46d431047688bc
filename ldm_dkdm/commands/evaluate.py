"""Measure a student against its teacher, without data: dkdm evaluate -r MODEL [--teacher MODEL] [key=value ...]

`teacher.key=value` and `student.key=value` are hints for one of the two.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_dkdm.commands.arguments import add_hints, flags, load_plugins, read_hints
from ldm_dkdm.commands.hints import ScopedHints
from ldm_dkdm.config.checked import names_of
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded

if TYPE_CHECKING:
    from ldm_dkdm.config.schema import DistillRun
    from ldm_dkdm.model import DiffusionModel

FLAGS = {
    "images": "--n_samples",
    "steps": "--custom_steps",
    "chains": "--chains",
    "batch_size": "--batch_size",
    "seed": "--seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The student, the teacher, and how much is measured."""
    add = parser.add_argument
    add("-r", "--resume", required=True, metavar="MODEL", help="the student: a run folder or any other model")
    add("--teacher", help="the teacher; default: the one in the config of the student's run")
    add("-n", "--n_samples", type=int, default=1000, help="images for the Frechet distance, 65 or more; 0: none")
    add("-c", "--custom_steps", type=int, help="DDIM steps; default: 20, or all T where there are fewer")
    add("--chains", type=int, default=32, help="held-out ancestral chains of the teacher")
    add("--seed", type=int, default=1_000_000)
    add("--batch_size", type=int, default=128)
    add("-o", "--out", type=expanded, help="JSON file; default: evaluation.json beside the student, or beside a .ckpt")
    add("--precision", choices=names_of("ldm_dkdm.device:PRECISIONS"), default="32")
    add_hints(parser)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write the figures."""
    numbers = {
        "images": options.n_samples,
        "steps": options.custom_steps,
        "chains": options.chains,
        "seed": options.seed,
        "batch_size": options.batch_size,
    }
    if options.chains < 1 or options.batch_size < 1 or options.seed < 0:
        raise UserError("--chains and --batch_size must be at least 1, --seed at least 0")
    if options.n_samples != 0 and options.n_samples < 65:
        raise UserError("--n_samples: at least 65, the distance uses 64 principal components; or 0")
    read_hints(options.hints)  # refuses what is not key=value
    hints = ScopedHints(options.hints, ("student", "teacher"))
    load_plugins(options.plugin)

    from ldm_dkdm.checkpoints.card import FIGURES, PER_T, write_readme
    from ldm_dkdm.config.load import read_card
    from ldm_dkdm.config.schema import ModelCard
    from ldm_dkdm.device import default_device
    from ldm_dkdm.evaluation.comparison import evaluate
    from ldm_dkdm.files import write_text
    from ldm_dkdm.model import open_model

    device = default_device("auto")
    student = open_model(options.resume, hints.of("student"), lenient=True).to(device, options.precision)
    teacher = find_teacher(expanded(options.resume), options.teacher, hints).to(device, options.precision)
    hints.require_used({"student": student} | ({"teacher": teacher} if options.teacher else {}))
    with flags(**FLAGS):
        figures = evaluate(student, teacher, progress=True, **numbers)
    for name, value in figures.items():
        if name != PER_T:
            print(f"{name}: {value}")
    assert student.path is not None and student.file is not None  # set when a model is opened
    home = student.path if student.path.is_dir() else student.path.parent
    own = student.file.is_relative_to(home)  # otherwise it is a checkpoint of the run around the model folder
    out = options.out or (home / FIGURES if own else student.file.with_suffix(f".{FIGURES}"))
    write_text(out, json.dumps(figures, indent=2) + "\n")
    print(f"{out}: these figures and the eps error at every t")
    if own and options.out is None and "teacher_sha256" in student.info:
        write_readme(home, read_card(home / "config.yaml", ModelCard))


def find_teacher(student: Path, teacher: str | None, hints: ScopedHints) -> "DiffusionModel":
    """The teacher at a path, or the one that the student's run was distilled from, as the run used it."""
    from ldm_dkdm.commands.distill import open_teacher
    from ldm_dkdm.model import open_model

    run = run_of(student)
    if teacher is None:
        if run is None:
            raise UserError(f"--teacher: {student} is not a distillation's run folder or in one; name the teacher")
        return open_teacher(run)
    found = open_model(teacher, hints.of("teacher"), lenient=True)
    if run is None:
        return found
    null = run.teacher.null_label if found.null_label is None else found.null_label
    return found.changed(null_label=null, guidance=run.teacher.guidance)


def run_of(path: Path) -> "DistillRun | None":
    """The config of the distillation whose run folder is this path or around it (a student, its weights, a .ckpt)."""
    from ldm_dkdm.config.load import fits, load_config, read_yaml
    from ldm_dkdm.config.schema import DistillRun

    for folder in (path, *path.absolute().parents[:2]):
        file = folder / "config.yaml"
        if file.is_file() and fits(read_yaml(file), DistillRun):
            return load_config(file)
    return None
