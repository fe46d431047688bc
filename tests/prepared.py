"""Processes that are forked from one that has imported the package: an import takes longer than most of their work."""

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from tests.cli import ROOT

COMMANDS = ("convert", "decode", "distill", "evaluate", "inspect", "report", "sample", "train")
TRAININGS = ("autoencoder", "from_images", "from_teacher")
MODULES = [
    *(f"ldm_dkdm.commands.{name}" for name in COMMANDS),
    *(f"ldm_dkdm.training.{name}" for name in TRAININGS),
    "tests.fuzzing",
    "tests.rank_worker",
]  # what the forking process imports; it does nothing else
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(MODULES)
SECONDS = 250.0
BEGUN: list[BaseProcess] = []


def begin(
    work: Callable[..., object],
    *arguments: object,
    printed: Path = Path(os.devnull),
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start work in a process that can be killed: a session of its own, whose output is in a file.

    Args:
        work: a function of a module. arguments: what it takes; they are pickled.
        printed: where stdout and stderr go. environment: the variables; default: those of this process.
    """
    with chdir(ROOT), patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # of the forking process, for its imports
        forkserver.ensure_running()
    variables = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
    process = FORKS.Process(target=_run, args=(work, arguments, printed, variables, Path.cwd()))
    process.start()
    BEGUN.append(process)
    return process


def ended(process: BaseProcess, seconds: float = SECONDS) -> int:
    """The exit code of a process that ends by itself; negative: the number of the signal that ended it."""
    process.join(seconds)
    if process.exitcode is None:
        _kill(process)
        raise AssertionError(f"{process.name} does not end within {seconds} s")
    return process.exitcode


def end_what_is_left() -> None:
    """Kill what a test that failed has left at work: this process would wait for it at its end."""
    for process in BEGUN:
        if process.exitcode is None:
            _kill(process)
    BEGUN.clear()


def _kill(process: BaseProcess) -> None:
    """Kill a process and those that it has begun."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # where it has no session of its own yet
    process.join()


def _run(
    work: Callable[..., object], arguments: tuple[object, ...], printed: Path, variables: dict[str, str], folder: Path
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    with printed.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*arguments)
