"""An interrupted warm-up goes on at the step where it was, and its pool is that of an uninterrupted one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool, UserError
from ldm_dkdm.config.schema import WarmupConfig
from ldm_dkdm.distillation.walk import Walk
from ldm_dkdm.distillation.warmup import Warmup
from ldm_dkdm.training import pool_filling
from tests.analytic import GaussianNetwork
from tests.cli import distil
from tests.prepared import begin, ended
from tests.test_resume import result, whole_run, write_config

SCHEDULE, SHAPE, SLOTS = NoiseSchedule(num_timesteps=20), (2, 2, 2), 50
MODES = {
    "ancestral": WarmupConfig("ancestral", batch_size=16),
    "harvest": WarmupConfig("harvest", images=20, batch_size=8),
}
every_mode = pytest.mark.parametrize("mode", MODES)
POOL, WALK = "warmup.pool-rank0.safetensors", "warmup.walk-rank0.safetensors"


class Ended(Exception):
    """What ends a warm-up in these tests."""


def a_warmup(mode: str, rank: int = 0, last_call: int = 10**9) -> Warmup:
    """A warm-up, with an empty pool, that ends before the call after `last_call`."""
    network = GaussianNetwork(SCHEDULE, 0.7, 0.5)

    def check() -> None:
        if network.calls == last_call:
            raise Ended

    teacher = DiffusionModel(network, schedule=SCHEDULE, shape=SHAPE)
    return Warmup(NoisyPool(SLOTS, SHAPE), teacher, MODES[mode], rank=rank, check=check)


def run(warmup: Warmup, folder: Path, progress: Callable[[str, int, int], None] | bool = False) -> Warmup:
    pool_filling.warm_up(warmup, folder, "origin", progress)
    return warmup


def same_pools(one: Warmup, other: Warmup) -> bool:
    mine, theirs = one.pool.tensors(), other.pool.tensors()
    return one.pool.filled == other.pool.filled == SLOTS and all(torch.equal(mine[name], theirs[name]) for name in mine)


@every_mode
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("last_call", [1, 7, 25, 35])
def test_a_warm_up_that_ended_in_the_middle_of_a_chain_repeats_no_call(
    mode: str, rank: int, last_call: int, tmp_path: Path
) -> None:
    whole, first, second = a_warmup(mode, rank), a_warmup(mode, rank, last_call), a_warmup(mode, rank)
    run(whole, tmp_path / "whole")
    with pytest.raises(Ended):
        run(first, tmp_path / "run")
    run(a_warmup(mode, 1 - rank), tmp_path / "run")  # another process's files are beside them
    run(second, tmp_path / "run")
    assert same_pools(second, whole)
    samples = [warmup.teacher.network.samples for warmup in (first, second, whole)]
    assert samples[0] + samples[1] == samples[2]
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        f"warmup.pool-rank{rank}.safetensors" for rank in (0, 1)
    ]


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[int, Path]]]:
    """Of a mode: copies of the files after every fifth call, with the samples until then; each call ends in a save."""

    def make(mode: str) -> list[tuple[int, Path]]:
        found: list[tuple[int, Path]] = []
        before: list[int] = [0]

        def copy(what: str, done: int, total: int) -> None:
            if before[-1] and len(before) % 5 == 0:  # what is saved is that of the call before
                shutil.copytree(tmp_path / "run", tmp_path / f"copy{len(before)}")
                found.append((before[-1], tmp_path / f"copy{len(before)}"))
            before.append(done)

        with monkeypatch.context() as patch:
            patch.setattr(pool_filling, "SECONDS_BETWEEN_WARMUP_SAVES", -1.0)
            run(a_warmup(mode), tmp_path / "run", copy)
        return found

    return make


@every_mode
def test_what_a_killed_warm_up_saved_goes_on_exactly(mode: str, copies, tmp_path: Path) -> None:
    whole = run(a_warmup(mode), tmp_path / "whole")
    found = copies(mode)
    assert len(found) > 6
    for made, folder in found:
        later = run(a_warmup(mode), folder)
        assert same_pools(later, whole)
        assert later.teacher.network.samples == whole.teacher.network.samples - made


@every_mode
def test_a_warm_up_killed_between_its_two_files_goes_on_exactly(mode: str, copies, tmp_path: Path) -> None:
    whole, found = run(a_warmup(mode), tmp_path / "whole"), copies(mode)
    first = found[0][1] / WALK
    for _, folder in found[1:]:  # of the same batch of chains, and of later ones
        shutil.copy(first, folder / WALK)
        assert same_pools(run(a_warmup(mode), folder), whole)


@every_mode
def test_a_kill_after_any_write_loses_no_state(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, writes, ticks = run(a_warmup(mode), tmp_path / "whole"), [0], count(0, 250)
    with monkeypatch.context() as patch:
        patch.setattr(pool_filling, "time", SimpleNamespace(monotonic=lambda: next(ticks)))  # a save every third call
        for owner in (NoisyPool, Walk):

            def copying(self: object, path: Path, *facts: object, save=owner.save) -> None:
                save(self, path, *facts)
                writes[0] += 1
                shutil.copytree(path.parent, tmp_path / f"copy{writes[0]}")

            patch.setattr(owner, "save", copying)
        run(a_warmup(mode), tmp_path / "run")
    copies = list(tmp_path.glob("copy*"))
    assert len(copies) > 20
    assert all(same_pools(run(a_warmup(mode), folder), whole) for folder in copies)


@every_mode
def test_a_partial_pool_of_the_version_before_goes_on_at_its_last_batch(mode: str, copies, tmp_path: Path) -> None:
    whole = run(a_warmup(mode), tmp_path / "whole")
    for _, folder in copies(mode)[::3]:
        (folder / WALK).unlink(missing_ok=True)
        assert same_pools(run(a_warmup(mode), folder), whole)


@every_mode
def test_without_its_pool_a_walk_is_not_gone_on_with(mode: str, copies, tmp_path: Path) -> None:
    whole, folder = run(a_warmup(mode), tmp_path / "whole"), copies(mode)[0][1]
    (folder / POOL).unlink()
    again = run(a_warmup(mode), folder)
    assert same_pools(again, whole) and again.teacher.network.samples == whole.teacher.network.samples


@pytest.mark.parametrize("kind", ["flipped", "cut off", "empty", "another"])
def test_a_damaged_walk_is_refused_in_one_line(kind: str, copies) -> None:
    folder = copies("harvest")[0][1]
    content = bytearray((folder / WALK).read_bytes())
    content[-20] ^= 1
    cases = {"flipped": content, "cut off": content[:300], "empty": b"", "another": (folder / POOL).read_bytes()}
    (folder / WALK).write_bytes(cases[kind])
    with pytest.raises(UserError, match=rf"{WALK}: .*; delete it to start its batch of chains again$") as error:
        run(a_warmup("harvest"), folder)
    assert "\n" not in str(error.value)


@every_mode
def test_progress_moves_at_every_call_and_begins_where_the_warm_up_was(mode: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(Ended):
        run(a_warmup(mode, last_call=7), tmp_path, lambda what, done, total: seen.append((done, total)))
    assert len(seen) == 7
    whole = run(a_warmup(mode), tmp_path / "whole").teacher.network.samples
    run(a_warmup(mode), tmp_path, lambda what, done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {whole}
    done = [done for done, _ in seen]
    assert done[-1] == whole and done[:-1] == sorted(set(done))


def killed(mode: str, folder: Path) -> None:
    """Warm up in a process that ends in the middle of a chain."""
    pool_filling.SECONDS_BETWEEN_WARMUP_SAVES = -1.0
    run(a_warmup(mode), folder, lambda what, done, total: done > 300 and os.kill(os.getpid(), signal.SIGKILL))


def test_a_warm_up_that_was_killed_goes_on_in_the_middle_of_a_chain(tmp_path: Path) -> None:
    assert ended(begin(killed, "ancestral", tmp_path / "run"), 120) == -9
    assert (tmp_path / "run" / WALK).is_file()
    whole, later = run(a_warmup("ancestral"), tmp_path / "whole"), run(a_warmup("ancestral"), tmp_path / "run")
    assert same_pools(later, whole)
    assert later.teacher.network.samples < whole.teacher.network.samples - 250


def stopped_in_its_warm_up(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run, which ends in the middle of a chain."""
    leave = Warmup._leave

    def failing(self: Warmup, batch, x, t: int, label) -> None:
        if t == 9:
            raise UserError("stopped here")
        leave(self, batch, x, t, label)

    with monkeypatch.context() as patch:
        patch.setattr(Warmup, "_leave", failing)
        assert distil("--base", base) == 2


def test_a_run_removes_what_its_warm_up_left(teacher_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    warmup = {"mode": "harvest", "images": 8, "batch_size": 8}
    sections = {"distill": {"batch_size": 4, "rho": 0.5, "warmup": warmup}}
    whole = whole_run(teacher_folder, tmp_path, **sections)
    base, folder = write_config(teacher_folder, tmp_path, "stopped", **sections), tmp_path / "logs/stopped/checkpoints"
    stopped_in_its_warm_up(base, monkeypatch)
    assert {file.name for file in folder.iterdir()} == {POOL, WALK}
    walk = (folder / WALK).read_bytes()
    assert distil("--base", base) == 0
    assert result(folder.parent) == whole
    assert not list(folder.glob("warmup*"))
    (folder / WALK).write_bytes(walk)  # as a process leaves it that is killed after the last save of its pool
    assert distil("--resume", folder.parent, "trainer.max_steps=7") == 0
    assert not list(folder.glob("warmup*"))


@pytest.mark.parametrize("older", [False, True])
def test_a_warm_up_goes_on_although_its_teacher_has_moved(
    older: bool, teacher_folder: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    own, moved = Path(shutil.copytree(teacher_folder, tmp_path / "own")), tmp_path / "moved"
    warmup = {"mode": "harvest", "images": 8, "batch_size": 8}
    base = write_config(own, tmp_path, "run", distill={"batch_size": 4, "rho": 0.5, "warmup": warmup})
    run = tmp_path / "logs" / "run"
    stopped_in_its_warm_up(base, monkeypatch)
    own.rename(moved)
    if older:  # origins began with the path
        for name, kind in ((POOL, "pool"), (WALK, "walk")):
            file = run / "checkpoints" / name
            with safe_open(file, "pt") as opened:
                facts = json.loads(opened.metadata()[kind])
            save_file(load_file(file), file, {kind: json.dumps({**facts, "origin": f"{own}, {facts['origin']}"})})
    assert distil("--resume", run, f"teacher.ckpt={moved}", "trainer.max_steps=1") == 0
    assert (run / "student" / "config.yaml").is_file()
    assert "are not used" not in caplog.text
