"""Distil the shipped teacher on a CPU and compare both: dkdm demo. A second call reuses existing results."""

import argparse
from pathlib import Path

from ldm_dkdm.errors import Stopped

RUN = Path("logs/quickstart")
COMPARISON = RUN / "teacher_vs_student.png"
SAMPLING = ["-n", "64", "-c", "30", "--sampler", "dpm-solver++", "--no_png"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Overrides of the recipe `quickstart`."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example trainer.max_minutes=30")


def run(options: argparse.Namespace) -> None:
    """Distil into logs/quickstart, then sample teacher and student from the same noise."""
    from ldm_dkdm.commands import distill, sample
    from ldm_dkdm.commands.main import parser_of

    print(f"distilling models/teachers/emoji64 into {RUN}, without an image", flush=True)
    begun = ["--resume", str(RUN)] if (RUN / "config.yaml").is_file() else ["--base", "quickstart"]
    fixed = [] if begun[0] == "--resume" else ["logging.dir=logs", "logging.name=quickstart"]
    arguments = [*begun, *fixed, *options.overrides]
    try:
        distill.run(parser_of("distill").parse_args(arguments))
    except Stopped as stop:
        raise Stopped(f"{stop}; dkdm demo also continues it, and writes the comparison at the end") from stop
    student = RUN / "student" / "student.safetensors"
    if not COMPARISON.is_file() or COMPARISON.stat().st_mtime < student.stat().st_mtime:
        models = ["-r", "models/teachers/emoji64", str(RUN), "-l", str(RUN / "samples/final")]
        sample.run(parser_of("sample").parse_args([*models, *SAMPLING, "--compare", str(COMPARISON)]))
    print(COMPARISON)
