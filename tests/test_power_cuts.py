"""A power cut loses at most the time since the last save."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ldm_dkdm import load_model
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.training.resuming import Choice
from ldm_dkdm.training.run_folder import checkpoints, step_of
from tests.cli import distil
from tests.loop_disk import copied, missing, mounted, new_image
from tests.prepared import begin
from tests.test_resume import write_config

CUTS = 20
PAUSES = (0.05, 0.6)  # seconds between cuts


@dataclass(frozen=True)
class Cut:
    """A copy of the disk of a run, and the newest checkpoint that the run had then."""

    image: Path
    step: int


def cuts(image: Path, run: Path, process: BaseProcess, seed: int) -> Iterator[Cut]:
    """Copies at random moments after the first save; the run stands still while it is copied."""
    moments = random.Random(seed)
    while not checkpoints(run / "checkpoints"):
        assert process.is_alive(), "the run ended before its first save"
        time.sleep(0.05)
    for number in range(CUTS):
        time.sleep(moments.uniform(*PAUSES))
        assert process.is_alive(), f"the run ended before cut {number}"
        os.kill(process.pid, signal.SIGSTOP)
        step = max(map(step_of, checkpoints(run / "checkpoints")))
        yield Cut(copied(image, image.with_name(f"cut{number}.img")), step)
        os.kill(process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def cut_runs(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Cut]:
    """What power cuts leave of a run that saves at every step; it is killed afterwards."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("disks")
    image = new_image(folder / "disk.img")
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(mounted(image, folder / "disk"))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no disk can be mounted here: {error.stderr}")
        changes = {"trainer": {"max_steps": 100_000}, "logging": {"save_every": 1, "sample_every": 2}}
        base = write_config(teacher_folder, disk, "run", **changes)
        process = begin(distil, "--base", base, printed=folder / "said")
        try:
            return list(cuts(image, disk / "logs" / "run", process, seed=0))
        finally:
            process.kill()
            process.join()


def test_after_a_power_cut_a_run_has_lost_one_save_at_most(cut_runs: list[Cut]) -> None:
    assert len(cut_runs) == CUTS
    for cut in cut_runs:
        with mounted(cut.image, cut.image.with_name("after")) as disk:
            run = disk / "logs" / "run"
            newest = Choice(run / "checkpoints", pools=True).latest
            assert newest is not None and step_of(newest) >= cut.step - 1
            load_config(run / "config.yaml", schema=DistillRun)
            assert load_model(run).info["step"] >= cut.step - 1
            assert not [file for file in run.rglob("*.png") if file.stat().st_size == 0]


def test_after_a_power_cut_a_run_goes_on(cut_runs: list[Cut], capsys: pytest.CaptureFixture[str]) -> None:
    cut = cut_runs[-1]
    with mounted(cut.image, cut.image.with_name("after")) as disk:
        run = disk / "logs" / "run"
        assert distil("--resume", run, f"trainer.max_steps={cut.step + 2}", f"logging.dir={run.parent}") == 0
        assert "continues from the checkpoint of step" in capsys.readouterr().out
        assert (run / "checkpoints" / f"step={cut.step + 2:08d}.ckpt").is_file()


def test_what_is_written_is_on_the_disk_before_it_has_its_name_and_before_old_files_go(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()  # inodes whose content is on the disk
    unsettled: set[Path] = set()  # folders with new names that may not be on the disk
    wrong: list[str] = []
    seen = {"replace": 0, "unlink": 0}
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def on_fsync(opened: int) -> None:
        fsync(opened)
        synced.add(os.fstat(opened).st_ino)
        unsettled.discard(Path(f"/proc/self/fd/{opened}").readlink())

    def on_replace(old: Path, new: Path) -> None:
        if os.stat(old).st_ino not in synced:  # noqa: PTH116 (what the patched function gets)
            wrong.append(f"{new} has its name before its content")
        replace(old, new)
        unsettled.add(Path(new).parent)
        seen["replace"] += 1

    def on_unlink(path: Path, **options: int) -> None:
        if str(path).endswith(".ckpt"):
            seen["unlink"] += 1
            wrong.extend(f"{path} goes before {folder} is on the disk" for folder in unsettled)
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(os, "replace", on_replace)
    monkeypatch.setattr(os, "unlink", on_unlink)
    assert distil("--base", write_config(teacher_folder, tmp_path, "run", logging={"save_every": 1})) == 0
    assert wrong == [] and not unsettled
    assert seen["unlink"] == 4 and seen["replace"] >= 6 * 5
