"""A run that was stopped and resumed equals, to the last bit, the run that was not."""

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.distillation.warmup import Warmup
from ldm_dkdm.files import machine
from ldm_dkdm.records import DistillBatch
from ldm_dkdm.training.run_folder import RunFolder, alone_in
from tests.cli import contents, distil, table, write_yaml
from tests.parts import distill_config
from tests.run_folders import copied

QUIET = {"logging": {"save_every": 99, "sample_every": 99}}  # one save, at the end; no grids
Made = tuple[bytes, dict[str, bytes]]  # the student's file, and the pool's tensors
SHORT = {**QUIET, "trainer": {"max_steps": 2}}


def write_config(teacher: Path, folder: Path, name: str, **sections: dict[str, object]) -> Path:
    """A configuration whose run is <folder>/logs/<name>."""
    config = distill_config(teacher, folder / "logs", **sections)
    config["logging"]["name"] = name
    return write_yaml(folder / f"{name}.yaml", config)


def result(folder: Path, step: int = 6) -> Made:
    """The student's file, and what is in the pool's, whose header is in no fixed order."""
    pool = load_file(folder / "checkpoints" / f"step={step:08d}.pool-rank0.safetensors")
    student = folder / "student" / "student.safetensors"
    return student.read_bytes(), {name: tensor.numpy().tobytes() for name, tensor in pool.items()}


def whole_run(teacher: Path, folder: Path, name: str = "whole", **sections: dict[str, object]) -> Made:
    assert distil("--base", write_config(teacher, folder, name, **sections)) == 0
    return result(folder / "logs" / name, sections.get("trainer", {}).get("max_steps", 6))


@pytest.fixture(scope="module")
def finished(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, to be copied."""
    home = tmp_path_factory.mktemp("finished")
    whole_run(teacher_folder, home)
    return home / "logs" / "whole"


@pytest.fixture(scope="module")
def whole(finished: Path) -> Made:
    """The result of the run of 6 steps."""
    return result(finished)


@pytest.fixture(scope="module")
def stopped(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which Ctrl-C has stopped at step 3, to be copied."""
    home = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch).append(signal.SIGINT)
        assert distil("--base", write_config(teacher_folder, home, "stopped")) == 130
    return home / "logs" / "stopped"


@pytest.fixture
def signal_in_training(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return signalled(monkeypatch)


def signalled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers put in the list are sent to this process when the third batch of a stream is made."""
    numbers: list[int] = []
    next_batch = DistillStream.next_batch

    def signalling(self: DistillStream) -> DistillBatch:
        if self.step == 2 and numbers:
            os.kill(os.getpid(), numbers.pop())
        return next_batch(self)

    monkeypatch.setattr(DistillStream, "next_batch", signalling)
    return numbers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stopped_resumes_exactly(
    number: int,
    teacher_folder: Path,
    tmp_path: Path,
    signal_in_training: list[int],
    capsys: pytest.CaptureFixture[str],
    whole: Made,
) -> None:
    base = write_config(teacher_folder, tmp_path, "stopped", logging={"save_every": 100})
    run = tmp_path / "logs" / "stopped"
    signal_in_training.append(number)
    assert distil("--base", base) == 130
    assert f"stopped and saved at step 3; continue with: dkdm distill --resume {run}" in capsys.readouterr().err
    assert [f.name for f in run.glob("checkpoints/*.ckpt")] == ["step=00000003.ckpt"]
    assert result(run, 3)[0] != whole[0]
    assert distil("--resume", run) == 0
    assert result(run) == whole


def test_the_same_command_goes_on_too(teacher_folder: Path, stopped: Path, whole: Made, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path / "logs")
    assert distil("--base", write_config(teacher_folder, tmp_path, "stopped")) == 0
    assert result(run) == whole


def test_schedule_clipping_and_a_mapped_pool_resume_exactly(
    teacher_folder: Path, tmp_path: Path, signal_in_training: list[int], whole: Made
) -> None:
    trainer = {"lr_schedule": "cosine", "lr_warmup": 2, "grad_clip": 0.01}
    sections = {"trainer": trainer, "distill": {"pool_storage": "mmap", "stride": 3}, **QUIET}
    plain, whole = whole, whole_run(teacher_folder, tmp_path, **sections)
    assert whole != plain
    base = write_config(teacher_folder, tmp_path, "stopped", **sections)
    signal_in_training.append(signal.SIGINT)
    assert distil("--base", base) == 130
    assert distil("--resume", tmp_path / "logs" / "stopped") == 0
    assert result(tmp_path / "logs" / "stopped") == whole


@pytest.mark.parametrize("change", ["distill.batch_size=2", "student.params.model_channels=64", "trainer.seed=9"])
def test_a_resume_with_other_parts_is_refused_and_the_run_stays_whole(
    change: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = contents(stopped)
    assert distil("--resume", stopped, change) == 2
    assert f"error: {change.split('=', maxsplit=1)[0]}: cannot change" in capsys.readouterr().err
    assert contents(stopped) == kept  # which other tests resume


def test_dropout_resumes_exactly(
    teacher_folder: Path, tmp_path: Path, signal_in_training: list[int], whole: Made
) -> None:
    student = distill_config(teacher_folder, tmp_path)["student"]
    student["params"]["dropout"] = 0.1
    without, whole = whole, whole_run(teacher_folder, tmp_path, student=student, **QUIET)
    assert whole != without
    base = write_config(teacher_folder, tmp_path, "stopped", student=student, **QUIET)
    signal_in_training.append(signal.SIGINT)
    assert distil("--base", base) == 130
    assert distil("--resume", tmp_path / "logs" / "stopped") == 0
    assert result(tmp_path / "logs" / "stopped") == whole


@pytest.mark.parametrize(
    ("mode", "number"), [("ddim", signal.SIGINT), ("ancestral", signal.SIGTERM), ("harvest", signal.SIGINT)]
)
def test_a_warm_up_that_was_stopped_resumes_exactly(
    mode: str, number: int, teacher_folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    warmup = {"mode": mode, "steps": 5, "images": 8, "batch_size": 4}
    distill = {"distill": {"batch_size": 4, "rho": 0.5, "warmup": warmup}, **SHORT}
    whole = whole_run(teacher_folder, tmp_path, **distill)
    base = write_config(teacher_folder, tmp_path, "stopped", **distill)
    run = tmp_path / "logs" / "stopped"
    whole_warmup = Warmup.run

    def stopped_after_a_call(self: Warmup) -> Iterator[int]:
        for calls in whole_warmup(self):
            os.kill(os.getpid(), number)
            yield calls

    with monkeypatch.context() as patch:
        patch.setattr(Warmup, "run", stopped_after_a_call)
        assert distil("--base", base) == 130
    assert f"in the warm-up; continue with: dkdm distill --resume {run}" in capsys.readouterr().err
    assert not list(run.glob("checkpoints/*.ckpt"))
    assert distil("--resume", run) == 0
    assert result(run, 2) == whole


def test_resume_last_finds_the_run_that_was_written_to_last(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    copied(stopped, tmp_path / "logs")
    write_yaml(tmp_path / "logs" / "older" / "config.yaml", {})
    os.utime(tmp_path / "logs" / "older" / "config.yaml", (1, 1))
    assert distil("--resume", "last", "trainer.max_steps=4") == 0
    assert "student: logs/stopped/student" in capsys.readouterr().out
    assert len(result(tmp_path / "logs" / "stopped", 4)) == 2


def test_a_finished_run_goes_on_to_more_steps_exactly(teacher_folder: Path, finished: Path, tmp_path: Path) -> None:
    more = whole_run(teacher_folder, tmp_path, "more", trainer={"max_steps": 9}, **QUIET)
    run = copied(finished, tmp_path / "logs")
    assert distil("--resume", run, "trainer.max_steps=9", "distill.pool_storage=mmap") == 0  # changes no batch
    assert result(run, 9) == more


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_resume_trains_with_the_numbers_that_it_is_given(schedule: str, stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path / "logs")
    given = ("learning_rate=2e-4", "weight_decay=0.5", f"lr_schedule={schedule}", "lr_warmup=9", "max_steps=6")
    words = [f"trainer.{item}" for item in given]
    assert distil("--resume", run, "logging.log_every=1", "logging.sample_every=99", *words) == 0
    rows = {int(row["step"]): float(row["learning_rate"]) for row in table(run / "metrics.csv")}
    for done in (3, 4, 5):
        fall = 0.5 * (1 + math.cos(math.pi * done / 6)) if schedule == "cosine" else 1.0
        assert rows[done + 1] == pytest.approx(2e-4 * (done + 1) / 10 * fall, rel=1e-6)
    saved = torch.load(run / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"]) == (2e-4, 0.5)


def test_a_resume_with_a_shorter_window_stops_early(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    stop = {"window": 100, "patience": 1, "min_delta": 1e9}
    whole_run(teacher_folder, tmp_path, "run", trainer={"max_steps": 1, "early_stop": stop}, **QUIET)
    words = ("trainer.early_stop.window=2", "trainer.max_steps=20")
    assert distil("--resume", tmp_path / "logs" / "run", *words) == 0
    assert "early stop at step 4" in capsys.readouterr().out


def test_a_resume_keeps_what_was_logged_before(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "logs")
    older = run / "metrics" / "metrics.csv"  # as earlier versions wrote it
    older.parent.mkdir()
    older.write_text("loss,step\n1,9\n")
    before = (run / "metrics.csv").read_text()
    assert distil("--resume", run, "trainer.max_steps=7") == 0
    after = (run / "metrics.csv").read_text()
    assert after.startswith(before) and after != before
    assert older.read_text() == "loss,step\n1,9\n"


def test_one_seed_gives_equal_runs_and_another_does_not(teacher_folder: Path, whole: Made, tmp_path: Path) -> None:
    torch.manual_seed(1)  # the state of torch's own generator must not matter
    assert whole_run(teacher_folder, tmp_path, "second", **QUIET) == whole
    other = whole_run(teacher_folder, tmp_path, "other", trainer={"seed": 1}, **QUIET)
    assert other[0] != whole[0] and other[1] != whole[1]


def test_a_memory_mapped_pool_gives_the_same_run(teacher_folder: Path, whole: Made, tmp_path: Path) -> None:
    assert whole_run(teacher_folder, tmp_path, "mapped", distill={"pool_storage": "mmap"}, **QUIET) == whole


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("every", [1, 2])  # at 1, the save comes before the loss and the agreement show it
def test_weights_that_diverged_are_not_saved(every: int, teacher_folder: Path, tmp_path: Path, capsys) -> None:
    log = {"save_every": every, "evaluate_every": 1}
    base = write_config(teacher_folder, tmp_path, "wild", trainer={"weight_decay": 1e35}, logging=log)
    assert distil("--base", base) == 2
    err = capsys.readouterr().err
    if every == 2:
        assert "agreement: left out (UserError: the student: its predictions are not finite (t = " in err
    assert f"trainer.learning_rate: the run diverged by step {every}" in err
    assert not list((tmp_path / "logs" / "wild" / "checkpoints").glob("step=*"))


def test_two_processes_do_not_train_in_one_folder(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    base = write_config(teacher_folder, tmp_path, "shared", **SHORT)
    run = tmp_path / "logs" / "shared"
    run.mkdir(parents=True)
    with alone_in(RunFolder(run)):
        assert distil("--base", base) == 2
    assert f"{run}: another process trains there" in capsys.readouterr().err
    assert distil("--base", base) == 0


def test_what_a_killed_process_left_behind_goes_with_the_next_save(teacher_folder: Path, tmp_path: Path) -> None:
    base = write_config(teacher_folder, tmp_path, "killed", **SHORT)
    student = tmp_path / "logs" / "killed" / "student"
    student.mkdir(parents=True)
    for name in (f".student.safetensors.{machine()}-999999999.tmp", ".step=00000003.ckpt.pending"):
        (student / name).write_bytes(b"half")
    for name in (".student.safetensors.999999999.tmp", ".tmpAbC123"):  # of older versions, of safetensors
        (student / name).write_bytes(b"half")
        os.utime(student / name, (1, 1))
    running = student / f".evaluation.json.{machine()}-{os.getppid()}.tmp"  # of another command
    running.mkdir()
    (student.parent / "pool-rank0.bin").write_bytes(b"pool")
    assert distil("--base", base) == 0
    assert list(student.glob(".*")) == [running] and not list(student.parent.glob("pool-rank*"))
    (student.parent / "pool-rank0.bin").write_bytes(b"pool")  # of a process that was killed after its last save
    assert distil("--base", base) == 0
    assert not list(student.parent.glob("pool-rank*"))


def test_a_run_that_an_older_version_began_goes_on(stopped: Path, whole: Made, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path / "logs")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["teacher"].pop("licence", "absent") is None and config["trainer"].pop("max_minutes") is None
    write_yaml(run / "config.yaml", config)
    assert distil("--resume", run) == 0
    assert result(run) == whole
    write_yaml(run / "config.yaml", {**config, "trainer": {**config["trainer"], "seed": 1}})
    assert distil("--resume", run, "trainer.seed=2") == 2
