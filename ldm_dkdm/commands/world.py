"""`--nodes N` and `--devices N`: flags for trainer.num_nodes and trainer.devices."""

import argparse
from collections.abc import Mapping, Sequence

from ldm_dkdm.config.load import read_overrides
from ldm_dkdm.errors import UserError

WORLD_FLAGS = (
    ("--nodes", "trainer.num_nodes", "number of machines"),
    ("--devices", "trainer.devices", "devices of each machine"),
)  # flag, the key that it stands for, what it counts


def add_world_arguments(parser: argparse.ArgumentParser) -> None:
    """`--nodes N` and `--devices N`, other names of two keys."""
    for flag, key, what in WORLD_FLAGS:
        shown = f"{what}, as {key}=N"
        parser.add_argument(flag, action="append", default=[], type=_count, metavar="N", help=shown)


def _count(text: str) -> int:
    if not text.isdecimal() or not text.isascii():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def world_overrides(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """Overrides for `--nodes` and `--devices`.

    Raises:
        UserError: the flag, or the key that it stands for, is given with another value.
    """
    written = [item for item in overrides if item.partition("=")[0] in ("trainer", *(key for _, key, _ in WORLD_FLAGS))]
    trainer = (read_overrides(written) if written else {}).get("trainer")
    found = []
    for flag, key, _ in WORLD_FLAGS:
        given, name = getattr(options, flag.removeprefix("--"), []), key.partition(".")[2]
        others = [trainer[name]] if isinstance(trainer, Mapping) and name in trainer else []
        if given and len(set(given)) > 1:
            raise UserError(f"{flag}: given as {' and as '.join(map(str, given))}; give it once")
        if given and others and others != given[:1]:
            raise UserError(f"{flag}: {given[0]}, and {key}: {others[0]} as an override; give one of them")
        found += [f"{key}={given[0]}"] if given else []
    return found
