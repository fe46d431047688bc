"""Distil the shipped teacher on a CPU and compare both: dkdm demo. A second call reuses existing results."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_dkdm.errors import Stopped, UserError

TEACHER = "models/teachers/emoji64"
RUN = Path("logs/quickstart")
COMPARISON = RUN / "teacher_vs_student.png"
OWN = {"logging.dir": str(RUN.parent), "logging.name": RUN.name, "teacher.ckpt": TEACHER}  # what the comparison reads
SAMPLING = ["-n", "64", "-c", "30", "--sampler", "dpm-solver++", "--no_png"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides of the recipe `quickstart`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example trainer.max_minutes=30")


def run(options: argparse.Namespace) -> None:
    """Distil into logs/quickstart, then sample teacher and student from the same noise.

    Raises:
        UserError: an override names another run folder or teacher.
    """
    from ldm_dkdm.commands import distill, sample
    from ldm_dkdm.commands.main import parser_of

    _require_own(options.overrides)
    print(f"distilling {TEACHER} into {RUN}, without an image", flush=True)
    begun = ["--resume", str(RUN)] if (RUN / "config.yaml").is_file() else ["--base", "quickstart"]
    fixed = [] if begun[0] == "--resume" else ["logging.dir=logs", "logging.name=quickstart"]
    arguments = [*begun, *fixed, *options.overrides]
    try:
        distill.run(parser_of("distill").parse_args(arguments))
    except Stopped as stop:
        raise Stopped(f"{stop}; dkdm demo also continues it, and writes the comparison at the end") from stop
    student = RUN / "student" / "student.safetensors"
    if not COMPARISON.is_file() or COMPARISON.stat().st_mtime < student.stat().st_mtime:
        models = ["-r", TEACHER, str(RUN), "-l", str(RUN / "samples/final")]
        sample.run(parser_of("sample").parse_args([*models, *SAMPLING, "--compare", str(COMPARISON)]))
    print(COMPARISON)


def _require_own(overrides: Sequence[str]) -> None:
    """Refuse another run folder or teacher than those that are compared."""
    from ldm_dkdm.config.checked import hints_of
    from ldm_dkdm.config.load import read_overrides
    from ldm_dkdm.config.schema import DistillRun

    given = read_overrides(overrides, hints_of(DistillRun))
    for key, own in OWN.items():
        section, _, name = key.partition(".")
        value = given[section].get(name, own) if isinstance(given.get(section), Mapping) else own
        if Path(str(value)) != Path(own):
            raise UserError(
                f"{key}: the demo distils {TEACHER} into {RUN}; leave the key out, or call dkdm distill --base "
                f"quickstart {key}={value}"
            )
