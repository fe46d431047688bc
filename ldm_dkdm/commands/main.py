"""`dkdm COMMAND ...`: finds the command, runs it, and turns errors into one line."""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

from ldm_dkdm import __version__
from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.device import is_first_rank
from ldm_dkdm.errors import (
    OtherRun,
    Stopped,
    UserError,
    interruptible,
    is_out_of_memory,
    legible,
    memory_asked,
    nearest,
)

COMMANDS = {
    "distill": "turn a diffusion model into a smaller one without data (Alg. 1)",
    "sample": "draw images from any model",
    "evaluate": "measure images and models, with data or a teacher as the reference",
    "report": "write one page about runs: samples, curves, figures",
    "convert": "write a model in another format",
    "inspect": "say what is in a checkpoint",
    "train": "train a diffusion model on images (Alg. 2)",
    "train-first-stage": "train a first stage on images",
    "decode": "decode latents in a file",
    "demo": "distil the shipped teacher on a CPU, and compare both",
}
SMALLER = {
    "distill": "lower distill.batch_size, distill.warmup.batch_size, or distill.rho for a smaller pool",
    "train": "lower data.batch_size, or set data.cache=false",
    "train-first-stage": "lower data.batch_size",
    "sample": "lower --batch_size",
    "evaluate": "lower --batch_size",
    "decode": "lower --batch_size",
}  # what to do where memory runs out
SMALLER["demo"] = SMALLER["distill"]
NO_BATCH = "this command has no batch size; end other programs, or take a machine with more memory"

PATIENCE = 2.0  # seconds in which a launcher ends the other ranks on a machine after the first one's error


class Command(Protocol):
    """Interface of a command's module, whose docstring is the command's description."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare what the command line may hold."""

    def run(self, options: argparse.Namespace) -> None:
        """Do the work."""


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0, 2 after a user's error, 130 after a stop.

    Args:
        command: the command; None: the first argument names it.
        arguments: default: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    guarded(lambda: _dispatch(command, given), SMALLER.get(command or " ".join(given[:1]), NO_BATCH))


def guarded(work: Callable[[], None], smaller: str = "lower the batch size") -> None:
    """Do the work of a command and exit with its code; a user's error is one line on stderr.

    Args:
        work: the command.
        smaller: what a user should do where memory runs out.
    """
    sys.exit(_exit_code(work, smaller))


def _exit_code(work: Callable[[], None], smaller: str) -> int:
    try:
        with spoken(), interruptible():
            work()
    except UserError as error:
        if not is_first_rank():
            time.sleep(PATIENCE)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:  # argparse's --help
        return int(end.code or 0)
    except Exception as error:
        print(f"error: {_told(error, smaller)}", file=sys.stderr)
        return 2
    return 0


def _told(error: Exception, smaller: str) -> str:
    """What an error of the machine says to a user: no memory, a full disk, no permission; others are raised."""
    if is_out_of_memory(error):
        return f"out of memory ({memory_asked(error)}); {smaller}"
    if isinstance(error, OSError):
        return f"{legible(str(error.filename or 'input/output'))}: {error.strerror or error}"
    raise error


def _dispatch(command: str | None, arguments: list[str]) -> None:
    by_script = command is not None
    if command is None:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return
        if arguments[0] == "--version":
            print(f"ldm_dkdm {__version__}")
            return
        command, arguments = arguments[0], arguments[1:]
    options = parser_of(command).parse_args(arguments)
    try:
        _module(command).run(options)
    except OtherRun as error:
        raise UserError(error.of_script if by_script else error.of_command) from error


def usage() -> str:
    """What `dkdm -h` prints."""
    lines = [f"  {name:<18} {meaning}" for name, meaning in COMMANDS.items()]
    head = "usage: dkdm COMMAND ... | --version\n\nData-free distillation of diffusion models (DKDM).\n"
    return "\n".join([head, *lines, "\ndkdm COMMAND --help lists its options."])


def parser_of(command: str) -> Parser:
    """The parser of a command.

    Raises:
        UserError: an unknown command.
    """
    if command not in COMMANDS:
        raise UserError(f"'{command}' is not a command{nearest(command, COMMANDS).replace('valid keys', 'commands')}")
    module = _module(command)
    parser = Parser(prog=f"dkdm {command}", description=module.__doc__)
    parser.add_argument("--version", action="version", version=f"ldm_dkdm {__version__}")
    module.add_arguments(parser)
    return parser


def _module(command: str) -> Command:
    return cast(Command, importlib.import_module(f"ldm_dkdm.commands.{command.replace('-', '_')}"))


@contextmanager
def spoken() -> Iterator[None]:
    """Print what the library logs: information on stdout, warnings on stderr."""
    handler = _Printer()
    logger = logging.getLogger("ldm_dkdm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Printer(logging.Handler):
    """Prints messages without decoration; of several ranks the first one does."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_first_rank():
            return
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(legible(record.getMessage()), file=stream, flush=True)
