"""What the command lines share."""

import argparse
import os
from pathlib import Path


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--base FILE [FILE ...] [key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--base",
        nargs="+",
        action="extend",
        default=[],
        metavar="YAML|key=value",
        help="configs, merged left to right, then overrides",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example trainer.max_steps=1000")
    return parser


def split_base(arguments: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The config files and the overrides, which may follow them after `--base`."""
    overrides = [item for item in arguments.base if "=" in item] + arguments.overrides
    return [Path(item) for item in arguments.base if "=" not in item], overrides


def local_rank() -> int:
    """The number of this process among a run's processes on the machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process speaks for all of a run's processes on the machine."""
    return local_rank() == 0
