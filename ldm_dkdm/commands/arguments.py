"""The command line of the scripts that train."""

import argparse
from dataclasses import dataclass
from typing import Generic, TypeVar

from ldm_dkdm.commands.parser import config_parser, split_base
from ldm_dkdm.config.load import load_config
from ldm_dkdm.errors import UserError
from ldm_dkdm.training.folder import RunFolder, find_run, run_folder

T = TypeVar("T")


@dataclass(frozen=True)
class Arguments(Generic[T]):
    """A validated config, the run's folder, and whether that run was asked to go on by `--resume`."""

    config: T
    folder: RunFolder
    resumed: bool
    options: argparse.Namespace


def training_parser(description: str) -> argparse.ArgumentParser:
    """`--base FILE [FILE ...] [key=value ...]` for a new run, `--resume RUN|last [key=value ...]` for an old one."""
    parser = config_parser(description)
    parser.add_argument("--resume", metavar="RUN|last", help="go on with a run folder, with its own configuration")
    return parser


def read_arguments(parser: argparse.ArgumentParser, schema: type[T]) -> Arguments[T]:
    """Parse a command line and load the config that it names, a new one or that of a run."""
    options = parser.parse_args()
    files, overrides = split_base(options)
    if options.resume:
        if files:
            raise UserError("--resume: a run has its own configuration; leave --base out (key=value still works)")
        folder = find_run(options.resume, schema)
        return Arguments(load_config(folder.path / "config.yaml", overrides, schema), folder, True, options)
    if not files:
        raise UserError("--base: name at least one config file, for example --base configs/quickstart.yaml")
    config = load_config(files, overrides, schema)
    return Arguments(config, run_folder(config.logging, "+".join(file.stem for file in files)), False, options)
