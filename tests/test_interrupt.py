"""Ctrl-C in a distillation that was called from Python, and a terminal that is closed."""

import fcntl
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import pytest

import ldm_dkdm as dkdm
from ldm_dkdm.commands.entry import main
from tests.cli import write_yaml
from tests.parts import distill_config
from tests.prepared import FORKS, begin, ended
from tests.process import changes, process_state
from tests.test_python_api import NUMBERS, assert_equal_runs, own_student, same, weights


@pytest.fixture
def teacher(teacher_folder: Path) -> dkdm.DiffusionModel:
    return dkdm.load_model(teacher_folder)


class Interrupt:
    """A progress callback that presses Ctrl-C once at a number of a kind of work."""

    def __init__(self, what: str, at: int) -> None:
        self.what, self.at, self.seen = what, at, []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))
        if what == self.what and done >= self.at:
            self.at = 10**9
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("what", "at", "where"), [("training", 3, "at step 3"), ("warm-up", 5, "in the warm-up")])
def test_ctrl_c_saves_and_the_same_call_ends_where_an_uninterrupted_one_does(
    what: str, at: int, where: str, teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    whole, numbers = own_student(teacher), {**NUMBERS, "save_every": 100}
    dkdm.distill(teacher, whole, tmp_path / "whole", **numbers)
    stopped, before = own_student(teacher), process_state()
    progress = Interrupt(what, at)
    with pytest.raises(dkdm.Stopped, match=f"stopped and saved {where}; call it again") as stop:
        dkdm.distill(teacher, stopped, tmp_path / "stopped", **{**numbers, "progress": progress})
    assert changes(before) == {} and not isinstance(stop.value, KeyboardInterrupt)
    assert ("warm-up", 40, 40) in progress.seen or what == "warm-up"
    later = own_student(teacher)
    dkdm.distill(teacher, later, tmp_path / "stopped", **numbers)
    assert same(weights(later), weights(whole))
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped", 6)


def test_a_second_ctrl_c_stops_at_once(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    def twice(what: str, done: int, total: int) -> None:
        if what == "training":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    student, before = own_student(teacher), process_state()
    with pytest.raises(KeyboardInterrupt):
        dkdm.distill(teacher, student, tmp_path / "run", **{**NUMBERS, "progress": twice})
    assert changes(before) == {} and not list((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))


def in_a_terminal(terminal: str, errors: Connection, base: Path) -> None:
    """Distil as from a terminal that begins a session; stderr goes elsewhere."""
    opened = os.open(terminal, os.O_RDWR)
    for stream, file in ((0, opened), (1, opened), (2, errors.fileno())):
        os.dup2(file, stream)
    os.close(opened)
    errors.close()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal that is closed sends its signal here
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True)
    with patch.object(sys, "argv", ["dkdm", "distill", "--base", str(base)]):
        main()


@pytest.fixture
def hangup() -> Iterator[Callable[[object], None]]:
    """Sets what the process does at a hang-up; afterwards it does what it did before."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


class HangUp(Interrupt):
    """A progress callback that hangs up twice at step 3, as a shell and the kernel do."""

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "training" and done >= self.at:
            self.at = 10**9
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_saves_unless_it_is_ignored(
    ignored: bool, teacher: dkdm.DiffusionModel, tmp_path: Path, hangup: Callable[[object], None]
) -> None:
    hangup(signal.SIG_IGN if ignored else signal.SIG_DFL)
    numbers = {**NUMBERS, "save_every": 100, "progress": HangUp("training", 3), "signals": (signal.SIGHUP,)}
    if ignored:
        assert dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **numbers).step == 6
        return
    with pytest.raises(dkdm.Stopped, match="stopped and saved at step 3"):
        dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **numbers)
    assert (tmp_path / "run" / "checkpoints" / "step=00000003.ckpt").is_file()


def test_a_closed_terminal_saves_the_run_though_the_reader_of_its_lines_ends_too(
    teacher_folder: Path, tmp_path: Path
) -> None:
    often = {"log_every": 1, "save_every": 10**6, "sample_every": 10**6}
    config = distill_config(teacher_folder, tmp_path, trainer={"max_steps": 10**6}, logging=often)
    base, rows = write_yaml(tmp_path / "base.yaml", config), tmp_path / "run" / "metrics.csv"
    (terminal, its_end), (reader, errors) = os.openpty(), FORKS.Pipe(duplex=False)
    process = begin(in_a_terminal, os.ttyname(its_end), errors, base)
    errors.close()
    waiting = time.monotonic() + 120
    while time.monotonic() < waiting and not (rows.is_file() and rows.read_text().count("\n") > 3):
        time.sleep(0.1)
        for output in (terminal, reader.fileno()):
            os.set_blocking(output, False)
            with suppress(BlockingIOError):
                os.read(output, 65536)  # else it is full, and the process waits
    for end in (its_end, terminal):
        os.close(end)
    reader.close()
    assert ended(process, 120) == 130
    assert len(list((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"))) == 1
