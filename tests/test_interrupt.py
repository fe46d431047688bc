"""Ctrl-C in a distillation that was called from Python."""

import signal
from pathlib import Path

import pytest

import ldm_dkdm as dkdm
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
