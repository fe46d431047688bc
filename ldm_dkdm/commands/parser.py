"""What the command lines share."""

import argparse
from pathlib import Path
from typing import NoReturn

from ldm_dkdm.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    hint = "see --help"

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` in place of printing the usage."""
        raise UserError(f"{message}; {self.hint}")


class ConfigParser(Parser):
    """A parser of scripts whose options are mostly keys of a config."""

    hint = "keys are set as key=value, for example trainer.max_steps=1000; see --help"


def config_parser(description: str) -> argparse.ArgumentParser:
    """A parser with `--base FILE [FILE ...] [key=value ...]`."""
    parser = ConfigParser(description=description)
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
    items = [*arguments.base, *arguments.overrides]
    files = [item for item in items if _is_file(item, item in arguments.base)]
    return [Path(item) for item in files], [item for item in items if item not in files]


def _is_file(item: str, after_base: bool) -> bool:
    """Whether an argument names a config; its path may hold a =."""
    named = after_base or item.endswith((".yaml", ".yml"))
    return named and ("=" not in item or Path(item).is_file())
