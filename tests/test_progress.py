"""Progress on stderr: bars on a terminal, and elsewhere lines at the start and end of each part and once a minute."""

import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ldm_dkdm import UserError, reporting
from tests.cli import distil, sample
from tests.test_logs import run

pytestmark = pytest.mark.usefixtures("few_images")


def test_long_work_writes_lines_where_stderr_is_no_terminal(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(teacher_folder, tmp_path, "quiet") == 0
    filling, filled, begun, ended = capsys.readouterr().err.splitlines()  # each took less than a minute
    assert filling == "warm-up: 40 calls of the teacher" and begun == "training: 6 steps"
    assert filled.startswith("warm-up 40/40, ") and ", took 00:0" in filled
    assert ended.startswith("step 6/6, ") and ", took 00:0" in ended and ", loss " in ended
    assert distil("--resume", tmp_path / "quiet", "trainer.max_steps=8") == 0
    assert capsys.readouterr().err.splitlines()[0] == "training: 8 steps, 6 of them done before"
    monkeypatch.setattr(reporting, "SECONDS_BETWEEN_LINES", 0.0)
    assert run(teacher_folder, tmp_path, "lines", logging={"evaluate_every": 3}) == 0
    assert sample("-r", tmp_path / "lines", "-n", 2, "-c", 2, "-l", tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    *steps, ended = (line for line in lines if line.startswith("step"))
    assert [line.split(",")[0] for line in steps] == [f"step {i}/6" for i in range(1, 7)]
    assert all("ETA" in line and "loss" in line and "it" in line for line in steps) and "took" in ended
    for start in (
        "warm-up 40/40, ",
        "held-out chains: 20 steps of 4 chains",
        "held-out chains 20/20, ",
        "images from the same noise: 3 images of the teacher",
        "sampling lines/student: 1 batch of up to 64 images",
        "sampling lines/student 1/1, ",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert len([line for line in lines if ": " in line and "ETA" not in line and "took" not in line]) == 5
    assert len([line for line in lines if "took" in line]) == 5  # each begins and ends
    assert not any("\r" in line for line in lines)


def test_work_that_fails_has_no_last_line_and_work_that_is_done_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(UserError), reporting.following(True, "sampling", "batch", 3) as show:
        show(2)
        raise UserError("no")
    with reporting.following(True, "reading", "image", 7, 7):
        pass
    with reporting.following(True, "encoding", "image", 2000, 1) as show:
        show(2000)
    failed, *whole = capsys.readouterr().err.splitlines()
    assert failed == "sampling: 3 batches"
    assert whole[0] == "encoding: 2,000 images, 1 of them done before"
    assert whole[1].startswith("encoding 2000/2000, ") and len(whole) == 2


def test_a_terminal_gets_bars_on_stderr(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(teacher_folder, tmp_path, "run", logging={"evaluate_every": 3}) == 0
    shown = capsys.readouterr()
    assert "training: 100%" in shown.err and "agreement=" in shown.err and "warm-up: 100%" in shown.err
    assert "training" not in shown.out and shown.out.endswith(f"student: {tmp_path / 'run' / 'student'}\n")


def test_a_closed_stderr_loses_the_lines_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    closed = (tmp_path / "closed").open("w")
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        with reporting.following(True, "sampling", "batch", 3) as show:
            show(3)
