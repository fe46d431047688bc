"""Runs whose newest checkpoint is damaged, renamed or incomplete go on from the one before, by themselves."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints.hashes import hash_file
from ldm_dkdm.training.resuming import Choice
from tests.cli import distil
from tests.test_resume import result, write_config

NEWEST = "step=00000006"


@pytest.fixture(scope="module")
def finished(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    assert distil("--base", write_config(teacher_folder, folder, "run", logging={"save_every": 4})) == 0
    return folder / "logs" / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "logs" / "run")


def flip_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewritten(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of what a checkpoint holds, in a file without a hash."""

    def write(folder: Path) -> None:
        path = folder / f"{NEWEST}.ckpt"
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)
        hash_file(path).unlink()

    return write


def with_nan(saved: dict) -> None:
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name].view(-1)[0] = float("nan")


def cut_off(size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / f"{NEWEST}.pool-rank0.safetensors", size)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip_in_the_middle(folder / f"{NEWEST}.ckpt"), "ckpt: is damaged: its content"),
    "flipped pool": (
        lambda folder: flip_in_the_middle(folder / f"{NEWEST}.pool-rank0.safetensors"),
        "safetensors: is damaged: its content",
    ),
    "pool cut off": (
        cut_off(100),
        "safetensors: not a readable pool file (not a readable safetensors file, its header",
    ),
    "pool cut off later": (cut_off(2000), "safetensors: not a readable pool file ("),
    "cut off": (lambda folder: (folder / f"{NEWEST}.ckpt").write_bytes(b"PK"), "ckpt: is damaged"),
    "empty": (lambda folder: (folder / f"{NEWEST}.ckpt").write_bytes(b""), "ckpt: is damaged"),
    "no pool": (
        lambda folder: (folder / f"{NEWEST}.pool-rank0.safetensors").unlink(),
        "pool-rank0.safetensors: missing; the checkpoint beside it cannot be resumed without its pool",
    ),
    "not a number": (rewritten(with_nan), "holds values that are not finite"),
    "without loops": (rewritten(lambda saved: saved.pop("loops")), "cannot be resumed, it lacks loops"),
    "weights alone": (rewritten(lambda saved: saved.clear()), "cannot be resumed, it lacks state_dict"),
    "another step": (rewritten(lambda saved: saved.update(global_step=4)), "is the checkpoint of step 4, not of"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_of_a_damaged_newest_checkpoint_is_said_what_is_wrong_and_the_one_before_is_taken(
    kind: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, words = DAMAGE[kind]
    damage(run / "checkpoints")
    assert Choice(run / "checkpoints", pools=True).latest == run / "checkpoints" / "step=00000004.ckpt"
    (line,) = caplog.messages
    assert "delete" not in line and "download" not in line
    assert words in line and NEWEST in line and line.endswith("; continuing from step=00000004.ckpt in its place")


def test_a_run_goes_on_by_itself_from_the_checkpoint_before_a_damaged_one(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_in_the_middle(run / "checkpoints" / f"{NEWEST}.pool-rank0.safetensors")
    assert distil("--resume", run, f"logging.dir={run.parent}") == 0
    told = capsys.readouterr()
    assert "continuing from step=00000004.ckpt in its place" in told.err
    assert f"{run}: continues from the checkpoint of step 4" in told.out
    assert result(run) == result(finished)
    assert (run / "checkpoints" / f"{NEWEST}.ckpt.damaged").exists()


def test_without_a_whole_checkpoint_the_message_says_what_to_delete(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        flip_in_the_middle(checkpoint)
    with pytest.raises(
        UserError, match=r"begin again under another name \(--base \S+/run/config.yaml logging.name=NEW"
    ):
        Choice(run / "checkpoints", pools=True)  # a run never replaces the model of one without checkpoints
    (run / "student").rename(run / "first_stage")
    with pytest.raises(UserError, match=r"; a copy of \S+/run/first_stage keeps the weights of this run"):
        Choice(run / "checkpoints", pools=True)
    shutil.rmtree(run / "first_stage")
    with pytest.raises(
        UserError, match=r"no earlier checkpoint is intact: delete \S+checkpoints to begin the run again"
    ):
        Choice(run / "checkpoints", pools=True)


def test_the_hashes_of_checkpoints_are_those_of_sha256sum(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        expected = f"{hashlib.sha256(checkpoint.read_bytes()).hexdigest()}  {checkpoint.name}\n"
        assert hash_file(checkpoint).read_text() == expected
