"""What a run logs: metrics.csv, pool.csv, TensorBoard, Weights & Biases."""

import itertools
import os
import signal
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_dkdm import load_model
from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.training import agreement_callback, ends, resuming, windows
from ldm_dkdm.training.grids import SampleGrid
from ldm_dkdm.training.pool_log import pool_figures
from ldm_dkdm.training.tables import Table
from tests.cli import distil, table, write_yaml
from tests.parts import distill_config
from tests.process import changes, process_state

pytestmark = pytest.mark.usefixtures("few_images")
TIMED = ("seconds", "steps_per_second")
QUIET = {"save_every": 99, "sample_every": 99}  # one save, at the end; no grids


def run(teacher: Path, folder: Path, name: str, **sections: dict[str, object]) -> int:
    config = distill_config(teacher, folder, **sections)
    config["logging"]["name"] = name
    return distil("--base", write_yaml(folder / f"{name}.yaml", config))


def figures(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics without times."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in table(folder / "metrics.csv")]


def test_a_row_has_the_means_of_its_steps(teacher_folder: Path, tmp_path: Path) -> None:
    for name, every in (("each", 1), ("windows", 4)):
        assert (
            run(teacher_folder, tmp_path, name, trainer={"max_steps": 10}, logging={**QUIET, "log_every": every}) == 0
        )
    each, windows = (table(tmp_path / name / "metrics.csv") for name in ("each", "windows"))
    assert list(each[0])[:6] == ["step", "seconds", "steps_per_second", "loss", "eps_mse", "learning_rate"]
    assert [row["step"] for row in windows] == ["4", "8", "10"]
    losses = [float(row["loss"]) for row in each]
    means = [np.mean(losses[a:b]) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert [float(row["loss"]) for row in windows] == pytest.approx(means, rel=1e-4)
    assert {row["learning_rate"] for row in windows} == {"0.001"}
    seconds = [float(row["seconds"]) for row in windows]
    steps = np.diff([0, 4, 8, 10]) / np.diff([0, *seconds])
    assert [float(row["steps_per_second"]) for row in windows] == pytest.approx(steps, rel=0.3)


def test_which_row_counts_a_measurement_and_which_a_grid(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(windows, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def taking(seconds: float, value: object = None) -> Callable[..., object]:
        def work(*arguments: object) -> object:
            clock[0] += seconds
            return value

        return work

    monkeypatch.setattr(SampleGrid, "_write", taking(50.0))  # twice at step 4: the student's and the teacher's
    monkeypatch.setattr(agreement_callback, "agreement", taking(7.0, {"agreement": 0.5}))
    log = {"log_every": 4, "evaluate_every": 4, "sample_every": 4, "save_every": 99}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 10}, logging=log) == 0
    rows = [(row["step"], float(row["seconds"])) for row in table(tmp_path / "run" / "metrics.csv")]
    assert rows == [("4", 7.0), ("8", 7.0 + 100.0 + 7.0), ("10", 7.0 + 100.0 + 7.0 + 50.0 + 7.0)]


@pytest.mark.parametrize(
    ("log", "steps"),
    [
        ({"evaluate_every": 2}, ["2", "4", "5"]),
        ({"evaluate_every": None, "sample_every": 4}, ["4", "5"]),
        ({"evaluate_every": 0, "save_every": 2}, ["2", "4", "5"]),
    ],
)
def test_when_the_pool_gets_a_row(
    log: dict[str, object], steps: list[str], teacher_folder: Path, tmp_path: Path
) -> None:
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 5}, logging={**QUIET, **log}) == 0
    assert [row["step"] for row in table(tmp_path / "run" / "pool.csv")] == steps


def test_an_early_end_leaves_its_window_to_a_resume(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, log = {"max_steps": 8, "max_minutes": 0.01}, {**QUIET, "log_every": 3}
    with monkeypatch.context() as patch:
        seconds = itertools.count(step=0.4)
        patch.setattr(ends, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        assert run(teacher_folder, tmp_path, "run", trainer=limit, logging=log) == 0
    assert not (tmp_path / "run" / "metrics.csv").exists()  # it ended at step 2
    assert distil("--resume", tmp_path / "run", "trainer.max_minutes=null") == 0
    assert [row["step"] for row in table(tmp_path / "run" / "metrics.csv")] == ["3", "6", "8"]


def test_a_stop_within_a_window_leaves_no_trace(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = {**QUIET, "log_every": 4, "evaluate_every": 3}
    assert run(teacher_folder, tmp_path, "whole", trainer={"max_steps": 8}, logging=log) == 0
    next_batch = DistillStream.next_batch

    def stopping(self: DistillStream) -> object:
        if self.step in (2, 5):
            os.kill(os.getpid(), signal.SIGINT)
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(DistillStream, "next_batch", stopping)
        assert run(teacher_folder, tmp_path, "stopped", trainer={"max_steps": 8}, logging=log) == 130
        assert distil("--resume", tmp_path / "stopped") == 130
    assert distil("--resume", tmp_path / "stopped") == 0
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")
    seconds = [float(row["seconds"]) for row in table(tmp_path / "stopped" / "metrics.csv")]
    assert seconds == sorted(seconds) and len(set(seconds)) == len(seconds)
    assert (tmp_path / "stopped" / "pool.csv").read_bytes() == (tmp_path / "whole" / "pool.csv").read_bytes()


def test_a_resume_from_an_older_checkpoint_takes_back_the_rows_after_it(teacher_folder: Path, tmp_path: Path) -> None:
    log = {**QUIET, "log_every": 1, "save_every": 4}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 6}, logging=log) == 0
    folder = tmp_path / "run"
    whole, pools = figures(folder), (folder / "pool.csv").read_bytes()
    with (folder / "metrics.csv").open("a") as file:
        file.write("7,0.5,3")  # cut off by a crash
    (folder / "checkpoints" / "step=00000006.ckpt").unlink()
    assert distil("--resume", folder) == 0
    assert figures(folder) == whole and (folder / "pool.csv").read_bytes() == pools


def test_a_table_takes_later_columns_and_ignores_what_is_none(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("step,b\n1,0.5\n2,0.25\n9,1\n10")
    rows = Table(file, ("step", "a", "b", "c"), resumed_at=2, optional=["a", "c"])
    rows.add({"step": 3, "b": 1 / 3})
    assert file.read_text() == "step,b\n1,0.5\n2,0.25\n3,0.333333\n"
    rows.add({"step": 4, "a": 7.0, "z": 1e-9})
    assert file.read_text() == "step,a,b,z\n1,,0.5,\n2,,0.25,\n3,,0.333333,\n4,7,,1e-09\n"


@pytest.mark.parametrize(
    ("content", "warning", "left"),
    [
        (b"not\na,table\n", "has no column step; it is left out", ""),
        (b"step,loss\n1,0.5\n2\n3,0.25\n", "line 3 has 1 cells, the header 2; it is left out", "1,0.5\n3,0.25\n"),
        (b"step,loss\n1,0.5\n,2\n", "line 3 has no step; it is left out", "1,0.5\n"),
        (b"\xff\n", "not a table of numbers", ""),
        (b"step,loss\n1,0.5\n2,", "", "1,0.5\n"),
    ],
)
def test_damaged_rows_do_not_keep_a_run_from_its_resume(
    content: bytes, warning: str, left: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    Table(tmp_path / "a.csv", ("step", "loss"), resumed_at=5).add({"step": 6, "loss": 1.0})
    assert (tmp_path / "a.csv").read_text() == f"step,loss\n{left}6,1\n"
    assert warning in caplog.text and bool(warning) == bool(caplog.records)


def test_a_resume_reads_a_huge_table_line_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, rows = tmp_path / "metrics.csv", "".join(f"{step},0.5\n" for step in range(1, 20_001))
    file.write_text(f"step,loss\n{rows}{'7' * 5_000_000}\n" + "damaged\n" * 3_000)
    tracemalloc.start()
    try:
        line = resuming.continues(tmp_path, 15_000)
        Table(file, ("step", "loss"), resumed_at=15_000).add({"step": 15_001, "loss": 1.0})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "continues from the checkpoint of step 15000; the steps after it are trained again (5000 at least)" in line
    assert file.read_text() == "step,loss\n" + "".join(rows.splitlines(True)[:15_000]) + "15001,1\n"
    assert peak < 1_000_000  # the file has 6 MB
    warned = [record.message for record in caplog.records]
    assert "line 20002 is longer than 100,000 bytes; it is left out" in warned[0] and len(warned) == 11


def test_the_pools_rows_follow_every_slot(teacher_folder: Path) -> None:
    teacher = load_model(teacher_folder)
    pool, last, config = (
        NoisyPool(24, teacher.shape),
        dict.fromkeys(range(24), 0),
        DistillConfig(4, rho=0.3, discard=0.4),
    )
    pool.fill(NoisyBatch(torch.randn(24, *teacher.shape), torch.arange(24) % 20))
    move = pool.move

    def following(indices: torch.Tensor, *rest: object) -> None:
        last.update(dict.fromkeys(indices.tolist(), stream.step + 1))
        move(indices, *rest)

    pool.move = following
    stream = DistillStream(teacher, pool, config, 20)
    for _ in range(18):
        stream.next_batch()
    found = pool_figures(pool, 20, step=9, batches=2)
    ages = [(18 - batch) / 2 for batch in last.values()]
    assert found["age_mean"] == pytest.approx(np.mean(ages)) and found["age_max"] == max(ages)
    assert (found["age_p50"], found["age_p90"]) == pytest.approx(tuple(np.quantile(ages, (0.5, 0.9))))
    assert [found[f"t_{t:02d}"] for t in range(20)] == [int((pool.t == t).sum()) for t in range(20)]


def test_a_pool_of_an_older_version_is_as_old_as_its_checkpoint(teacher_folder: Path, tmp_path: Path) -> None:
    assert run(teacher_folder, tmp_path, "run", trainer={"accumulate": 2, "max_steps": 2}, logging=QUIET) == 0
    folder = tmp_path / "run"
    file = folder / "checkpoints" / "step=00000002.pool-rank0.safetensors"
    tensors = load_file(file)
    header = {"pool": read_header(file)}
    save_file({name: tensor for name, tensor in tensors.items() if name != "updated"}, file, header)
    assert distil("--resume", folder, "trainer.max_steps=4") == 0
    assert table(folder / "pool.csv")[-1]["age_max"] == "2"


def read_header(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()["pool"]


def test_tensorboard_has_the_rows_and_the_grids_through_a_resume(teacher_folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = {"log_every": 2, "evaluate_every": 2, "sample_every": 3, "save_every": 2}
    assert run(teacher_folder, tmp_path, "run", logging=log) == 0
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step=00000006.ckpt").unlink()  # steps 5 and 6 are taken back
    assert distil("--resume", folder, "trainer.max_steps=8") == 0
    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    rows = table(folder / "metrics.csv")
    for name in ("loss", "agreement", "x0_drift"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-4)) for row in rows]
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert {event.step for event in events.Images("teacher")} == {3, 6}
    assert (folder / "samples" / "teacher.png").is_file()


def test_wandb_offline_continues_one_run_and_leaves_the_process_as_it_was(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = {"log_every": 1, "loggers": ["csv", "wandb"], "sample_every": 1}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 2}, logging=log) == 0
    before = process_state()
    assert distil("--resume", tmp_path / "run", "trainer.max_steps=3") == 0
    assert changes(before) == {}
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({folder.name.rpartition("-")[2] for folder in runs}) == 1
    assert all(list(folder.glob("*.wandb")) for folder in runs)
    assert len(list(runs[0].rglob("*.png"))) == 2 + 1  # two grids and the teacher's
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_logger_that_is_not_installed_is_one_line(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(teacher_folder, tmp_path, "run", logging={"loggers": ["wandb"]}) == 2
    assert capsys.readouterr().err == (
        "error: logging.loggers: wandb is not installed; pip install wandb, or leave wandb out\n"
    )
    assert not (tmp_path / "run").exists()
