"""The scripts, run in this process with a command line of one's own."""

import csv
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import yaml

ROOT = Path(__file__).parents[1]


def run_script(name: str, *arguments: object) -> int:
    """Run scripts/<name> as __main__ -> its exit code."""
    with patch.object(sys, "argv", [name, *map(str, arguments)]):
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def distil(*arguments: object) -> int:
    """Run the distillation's entry point -> its exit code."""
    return run_script("dkdm_ldm.py", *arguments)


def sample(*arguments: object) -> int:
    """Run the sampler's entry point -> its exit code."""
    return run_script("txt-free_sample.py", *arguments)


def write_yaml(path: Path, tree: Mapping[str, object]) -> Path:
    """Write a configuration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
