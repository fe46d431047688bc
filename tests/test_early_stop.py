"""Which weights an early stop leaves in the model folder, and what it says."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_dkdm import load_model
from ldm_dkdm.config.schema import EarlyStopConfig
from ldm_dkdm.training import ends
from ldm_dkdm.training.ends import EarlyStop
from tests.cli import distil
from tests.digits import distil_config
from tests.test_pixel_end_to_end import QUIET, Clock, judge

WINDOW = {"monitor": "loss", "window": 4}


def run(teacher: Path, folder: Path, name: str, stop: dict[str, Any] = WINDOW, **trainer: Any) -> int:
    base = distil_config(teacher, folder, name, trainer={"early_stop": stop, **trainer}, logging=QUIET)
    return distil("--base", base)


def exported(run: Path) -> int:
    """The step of the weights in the model folder."""
    return load_model(run / "student").info["step"]


def windows(run: Path, step: int) -> dict[str, Any]:
    """The early stop's state in a checkpoint."""
    saved = torch.load(run / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in saved.items() if "EarlyStop" in key)
    return state


@pytest.mark.parametrize(("losses", "step"), [([3, 3, 3, 3, 2, 2], 6), ([3, 3, 3, 3, 4, 4], 4), ([3, 3, 3, 3, 2], 4)])
def test_half_a_window_at_the_end_of_a_run_is_judged(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, losses: list[float], step: int
) -> None:
    judge(monkeypatch, losses)
    assert run(digits_teacher, tmp_path, "run", max_steps=len(losses)) == 0
    assert exported(tmp_path / "run") == step
    said = "trainer.early_stop.window (4): the steps after the last whole window (1) are fewer than half a window"
    assert (said in capsys.readouterr().out) == (len(losses) == 5)


@pytest.mark.parametrize(("rest", "step"), [([2, 2], 8), ([2, 9], 6)])
def test_a_resume_to_more_steps_counts_the_windows_of_an_uninterrupted_run(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: list[float], step: int
) -> None:
    losses = [3, 3, 3, 3, 2, 2, *rest]
    judge(monkeypatch, losses)
    assert run(digits_teacher, tmp_path, "whole", max_steps=8) == 0
    judge(monkeypatch, losses)
    assert run(digits_teacher, tmp_path, "halves", max_steps=6) == 0
    assert distil("--resume", tmp_path / "halves", "trainer.max_steps=8") == 0
    assert windows(tmp_path / "halves", 8) == windows(tmp_path / "whole", 8)
    assert exported(tmp_path / "halves") == step


def test_a_time_limit_ends_a_window_and_a_signal_leaves_it_open(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses() -> Iterator[float]:
        yield from (3, 3, 3, 3)
        os.kill(os.getpid(), signal.SIGINT)
        yield from (2, 2, 2, 2)

    judge(monkeypatch, losses())
    assert run(digits_teacher, tmp_path, "stopped", max_steps=8) != 0
    assert exported(tmp_path / "stopped") == 4 and windows(tmp_path / "stopped", 6)["steps"] == 2
    assert distil("--resume", tmp_path / "stopped") == 0
    assert exported(tmp_path / "stopped") == 8
    judge(monkeypatch, [3, 3, 3, 3, 2, 2])
    monkeypatch.setattr(ends, "time", Clock())
    assert run(digits_teacher, tmp_path, "limited", max_steps=8, max_minutes=1.0) == 0
    assert exported(tmp_path / "limited") == 6


def test_falls_that_do_not_count_for_the_patience_are_exported(
    digits_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(monkeypatch, [3.0, 4.0, 2.5])
    stop = {"monitor": "loss", "window": 1, "patience": 2, "min_delta": 1.0}
    assert run(digits_teacher, tmp_path, "run", stop, max_steps=9) == 0
    assert exported(tmp_path / "run") == 3
    said = "early stop at step 3: loss has not fallen by more than 1 below 3 in 2 windows"
    assert said in capsys.readouterr().out


def test_slow_falls_add_up_to_one_that_counts() -> None:
    stop = EarlyStop(EarlyStopConfig(window=1, patience=3, min_delta=0.1))
    bad = []
    for window in range(9):
        assert stop._judge(10 - 0.09 * window)  # each is the lowest so far
        bad.append(stop.bad_windows)
    assert bad == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert not stop.reached and stop.best == pytest.approx(9.28)


def test_the_best_window_of_an_earlier_version_stays_the_best() -> None:
    stop, config = {"monitor": "loss", "best": 2.0, "bad_windows": 1.0, "total": 0.0, "batches": 0.0}, EarlyStopConfig()
    resumed = EarlyStop(config)
    resumed.load_state_dict({**stop, "steps": 0.0})
    assert not resumed._judge(2.5) and resumed._judge(1.5)
    again = EarlyStop(config)
    again.load_state_dict(resumed.state_dict())
    assert again.lowest == 1.5
