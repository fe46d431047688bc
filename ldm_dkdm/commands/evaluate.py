"""Measure images or models: dkdm evaluate SAMPLES [REFERENCE] [--metrics NAME ...] [--features NAME|PATH] ...

SAMPLES and REFERENCE are models, folders of images, .npz files of images or statistics; SAMPLES may be a first stage.
`samples.key=value` and `reference.key=value` are hints for one of the two. REFERENCE defaults to a run's teacher.

Without data: dkdm evaluate -r RUN [--teacher MODEL], with hints `student.key=value` and `teacher.key=value`.
Of several evaluated runs: dkdm evaluate RUN RUN ... --table
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_dkdm.commands.arguments import add_first_stage_argument, add_plugin_argument, flags, load_plugins, read_hints
from ldm_dkdm.commands.evaluate_output import add_row, print_table, show
from ldm_dkdm.commands.evaluate_sets import RESULTS, measure_sets
from ldm_dkdm.commands.hints import ScopedHints, split_paths
from ldm_dkdm.commands.places import require_apart, require_kept, require_replaceable, require_writable
from ldm_dkdm.config.checked import names_of
from ldm_dkdm.device import started
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded

if TYPE_CHECKING:
    from ldm_dkdm.config.schema import DistillRun
    from ldm_dkdm.model import DiffusionModel

FLAGS = {
    "first_stage": "--first_stage",
    "images": "--n_samples",
    "steps": "--custom_steps",
    "cache": "--cache",
    "chains": "--chains",
    "pairs": "--pairs",
    "lpips": "--lpips",
    "batch_size": "--batch_size",
    "seed": "--seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both sets, the metrics, the sampling of models, and where results go."""
    add = parser.add_argument
    add("hints", nargs="*", metavar="SAMPLES [REFERENCE] [key=value ...]", help="two sets of images; hints for models")
    add("-r", "--resume", metavar="RUN", help="the student that is measured against its teacher, without data")
    add("--teacher", help="the teacher; default: the one in the config of the student's run")
    names = names_of("ldm_dkdm.evaluation.metrics:METRICS")
    listed = f"{', '.join(names)}; default: by --features"
    add("--metrics", nargs="+", action="extend", choices=names, metavar="NAME", help=listed)
    add("--features", default="inception", metavar="NAME|PATH", help=f"{_names()}, or a file with their weights")
    add("-n", "--n_samples", type=int, help="samples of each model; default: 10000, with -r 1000 (65 or more; 0: none)")
    add("-c", "--custom_steps", type=int, help="sampling steps; default: the sampler's; 20 with -r and for agreement")
    add("--sampler", choices=names_of("ldm_dkdm.diffusion.samplers:SAMPLERS"), default="ddim")
    add("-e", "--eta", type=float, default=0.0, help="DDIM's eta: 0 deterministic, 1 ancestral")
    labels = "class labels, in turn; default: random by seed"
    add("--labels", type=int, nargs="+", action="extend", default=[], help=labels)
    add("--seed", type=int, help="sample i depends on seed + i only; default: 0")
    add("--reference_seed", type=int, metavar="S", help="the same for a model as REFERENCE; default: seed + n_samples")
    add("--size", type=int, metavar="PIXELS", help="crop and resize the images of folders; default: as they are")
    add("--chains", type=int, help="held-out ancestral chains of the teacher, for agreement and -r; default: 32")
    pairs = "images that student and teacher make from the same noise, for agreement and -r; default: 16"
    add("--pairs", type=int, metavar="N", help=pairs)
    add("--lpips", metavar="FILE", help="torchvision's VGG16 weights, for LPIPS; default: torch.hub's cache")
    add("--batch_size", type=int, default=128)
    add("--precision", choices=names_of("ldm_dkdm.device:PRECISIONS"), default="32")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--processes", type=int, default=1, metavar="N", help="share the images; each takes a GPU if there are several")
    add("-o", "--out", type=expanded, help="JSON file, with --table its text; default: beside the model of a run")
    add("--results", type=expanded, default=RESULTS, metavar="CSV", help=f"gets a row; default: {RESULTS}")
    add(
        "--cache",
        type=expanded,
        metavar="DIR",
        help="folder of statistics and chains; default: ~/.cache/ldm_dkdm/statistics",
    )
    add("--save_statistics", type=expanded, metavar="NPZ", help="write the statistics of SAMPLES, to be a REFERENCE")
    add("--table", action="store_true", help="print the figures of evaluated runs as a Markdown table")
    add_first_stage_argument(parser)
    add_plugin_argument(parser)


def _names() -> str:
    return ", ".join(names_of("ldm_dkdm.evaluation.features:FEATURES"))


def run(options: argparse.Namespace) -> None:
    """Choose what is asked for: a table, two sets of images, or a student and its teacher."""
    paths, items = split_paths(options.hints)
    if options.table:
        _require_table(options, items)
        print_table([*([options.resume] if options.resume else []), *paths], options.out)
        return
    for flag in ("out", "results", "save_statistics"):
        require_writable(getattr(options, flag), f"--{flag}")
    _require_outputs(options, paths)
    if options.cache is not None and not options.cache.is_dir():  # one that holds all statistics may be read-only
        require_writable(options.cache, "--cache", folder=True)
    with _shared():
        _measure(options, paths, items)


def _require_table(options: argparse.Namespace, items: Sequence[str]) -> None:
    """Refuse what a table has no use for."""
    from ldm_dkdm.commands.main import parser_of

    require_writable(options.out, "--out")
    require_replaceable(options.out, "--out", "a table of evaluations")
    usual = vars(parser_of("evaluate").parse_args([]))
    used = ("table", "resume", "hints", "out")
    given = [name for name, value in vars(options).items() if name not in used and value != usual[name]]
    unused = [f"--{'first_stage' if name == 'stage' else name}" for name in given] + list(items)
    if unused:
        raise UserError(f"{unused[0]}: has no effect with --table, which takes runs, JSON files of evaluations and -o")


def _require_outputs(options: argparse.Namespace, paths: Sequence[str]) -> None:
    """Refuse to write over what this call reads, or over files of other kinds."""
    inputs = (*paths, options.resume, options.teacher, options.stage, options.features, options.lpips, *options.plugin)
    outputs = {f"--{flag}": getattr(options, flag) for flag in ("out", "results", "save_statistics")}
    require_apart(outputs, inputs)
    alone = options.resume and not options.metrics
    require_replaceable(options.out, "--out", "figures of a student (-r)" if alone else "figures of two sets")


def _shared() -> AbstractContextManager[object]:
    """Join the ranks that are started; one process alone imports nothing before its arguments are read."""
    world = started()
    if world is None or world.ranks == 1:
        return nullcontext()
    from ldm_dkdm.model.ranks import together

    return together()


def _measure(options: argparse.Namespace, paths: list[str], items: list[str]) -> None:
    """Measure two sets of images, or a student and its teacher."""
    if options.resume and not options.metrics:
        _compare(options)
    else:
        paths = [*([options.resume] if options.resume else []), *paths]
        if not paths:
            raise UserError("SAMPLES: name a model, a folder of images or an .npz; or a student with -r")
        if len(paths) > 2:
            raise UserError(f"'{paths[2]}': one argument too many; SAMPLES and REFERENCE are two (--table takes more)")
        measure_sets(options, paths, items)


def _compare(options: argparse.Namespace) -> None:
    """A student against its teacher: measure, print and write the figures."""
    sizes = {n: value for n in ("chains", "pairs", "batch_size") if (value := getattr(options, n)) is not None}
    numbers = {
        "images": 1000 if options.n_samples is None else options.n_samples,
        "steps": options.custom_steps,
        "seed": options.seed or 0,
        **sizes,
    }
    if min(sizes.values()) < 1 or numbers["seed"] < 0:
        raise UserError("--chains, --pairs and --batch_size must be at least 1, --seed at least 0")
    if numbers["images"] != 0 and numbers["images"] < 65:
        raise UserError("--n_samples: at least 65, the distance uses 64 principal components; or 0")
    _require_defaults(options)
    read_hints(options.hints)  # refuses what is not key=value
    hints = ScopedHints(options.hints, ("student", "teacher"))
    load_plugins(options.plugin)

    from ldm_dkdm.checkpoints.card import FIGURES, write_readme
    from ldm_dkdm.config.load import read_card
    from ldm_dkdm.config.schema import ModelCard
    from ldm_dkdm.device import resolve_device
    from ldm_dkdm.evaluation.comparison import evaluate
    from ldm_dkdm.evaluation.results import read_rows
    from ldm_dkdm.evaluation.student_figures import write_figures
    from ldm_dkdm.model import open_model
    from ldm_dkdm.model.ranks import joined

    read_rows(options.results)  # refuses another file before anything is measured
    with flags(device="--device"):
        device = resolve_device(options.device)
    student = open_model(options.resume, hints.of("student"), lenient=True).to(device, options.precision)
    teacher = find_teacher(expanded(options.resume), options.teacher, hints).to(device, options.precision)
    hints.require_used({"student": student} | ({"teacher": teacher} if options.teacher else {}))
    out = options.out or _place(student)
    if options.out is None:
        require_kept(out)
    with flags(**FLAGS):
        figures = evaluate(student, teacher, progress=True, lpips=options.lpips, cache=options.cache, **numbers)
    if not joined().first:
        return
    figures |= _report(options, student, teacher, figures, numbers)
    earlier = write_figures(out, figures, keep=options.out is None)
    print(f"{out}: these figures and the eps error at every t")
    if earlier:
        print(earlier)
    if out.name == FIGURES and options.out is None and "teacher_sha256" in student.info:
        write_readme(out.parent, read_card(out.parent / "config.yaml", ModelCard))


def _place(student: "DiffusionModel") -> Path:
    """The file for the figures of a student: in its folder, or beside the checkpoint of a run that it was read from."""
    from ldm_dkdm.checkpoints.card import FIGURES

    assert student.path is not None and student.file is not None  # set when a model is opened
    home = student.path if student.path.is_dir() else student.path.parent
    own = student.file.is_relative_to(home)
    return home / FIGURES if own else student.file.with_suffix(f".{FIGURES}")


def _report(
    options: argparse.Namespace,
    student: "DiffusionModel",
    teacher: "DiffusionModel",
    figures: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    """Print the figures of a student against its teacher and add a row of results; returns their provenance."""
    from ldm_dkdm.config.schema import SamplingConfig
    from ldm_dkdm.evaluation.comparison import steps_within
    from ldm_dkdm.evaluation.measurement import against_teacher
    from ldm_dkdm.evaluation.samples import compared

    steps = steps_within(numbers["steps"], teacher)
    config = SamplingConfig(numbers["images"] or 1, numbers["batch_size"], numbers["seed"], steps)
    found = against_teacher(student, teacher, figures, config, numbers["images"] > 0)
    show(found)
    add_row(options.results, found)
    known = compared(student, teacher, numbers["images"])
    for name, facts in (("student", found.samples), ("teacher", found.reference or {})):
        known |= {f"{name}_weights": facts["weights"], f"{name}_opened_from": facts["opened_from"]}
    known["warnings"] = found.warnings or None
    return {name: value for name, value in known.items() if value is not None}


def _require_defaults(options: argparse.Namespace) -> None:
    """Refuse options that `-r` alone does not use."""
    defaults = {"eta": 0.0, "sampler": "ddim", "features": "inception", "labels": []}
    defaults["processes"] = 1
    unused = ("sampler", "eta", "labels", "features", "reference_seed", "size", "save_statistics")
    for name in (*unused, "processes"):
        if getattr(options, name) != defaults.get(name):
            raise UserError(f"--{name}: has no effect with -r alone; add --metrics")


def find_teacher(student: Path, teacher: str | None, hints: ScopedHints) -> "DiffusionModel":
    """The teacher at a path, or the one that the student's run was distilled from, as the run used it."""
    from ldm_dkdm.model import open_model

    run = run_of(student)
    if teacher is None:
        if run is None:
            raise UserError(f"--teacher: {student} is not a distillation's run folder or in one; name the teacher")
        return teacher_of(run, student)
    found = open_model(teacher, hints.of("teacher"), lenient=True)
    if run is None:
        return found
    null = run.teacher.null_label if found.null_label is None else found.null_label
    return found.changed(null_label=null, guidance=run.teacher.guidance)


def teacher_of(run: "DistillRun", path: Path) -> "DiffusionModel":
    """The teacher that the config of a run names; where it cannot be opened, the flag that names another is named.

    Args:
        run: the config.
        path: the run folder, or what is in it.
    """
    from ldm_dkdm.commands.distill import open_teacher

    try:
        return open_teacher(run, path)
    except UserError as error:
        key, _, reason = str(error).partition(": ")
        if key != "teacher.ckpt":
            raise
        raise UserError(f"--teacher: the teacher of {path}: {reason}") from error


def run_of(path: Path) -> "DistillRun | None":
    """The config of the distillation whose run folder is this path or around it (a student, its weights, a .ckpt)."""
    from ldm_dkdm.config.load import fits, load_config, read_yaml
    from ldm_dkdm.config.schema import DistillRun

    for folder in (path, *path.absolute().parents[:2]):
        file = folder / "config.yaml"
        if file.is_file() and fits(read_yaml(file), DistillRun):
            return load_config(file, of_run=True)
    return None
