"""Before the first checkpoint, another number of ranks goes on with the warm-up on the disk, and a plan knows it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_dkdm import DiffusionModel, NoiseSchedule, NoisyPool, UserError, load_config, load_model
from ldm_dkdm.distillation.make_student import make_student
from ldm_dkdm.model.ranks import Ranks
from ldm_dkdm.training import pool_filling
from ldm_dkdm.training.parts import Distillation, assemble
from ldm_dkdm.training.pool_filling import going_on, prepare_pool
from ldm_dkdm.training.run_folder import RunFolder, open_run
from tests.analytic import GaussianNetwork
from tests.cli import distil, write_yaml
from tests.parts import distill_config

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEDULE, SLOTS = NoiseSchedule(num_timesteps=20), 40
MODES = ("ancestral", "harvest", "ddim", "dpm-solver++")


class Ended(Exception):
    """What ends a warm-up in these tests."""


def parts_for(ranks: int, mode: str, folder: Path) -> Distillation:
    """Parts whose teacher counts its calls."""
    base = write_yaml(folder / "base.yaml", distill_config(folder / "none", folder))
    words = [f"trainer.devices={ranks}", f"distill.warmup.mode={mode}", "distill.warmup.batch_size=8"]
    words += ["distill.warmup.steps=10"] if mode in ("ddim", "dpm-solver++") else []
    teacher = DiffusionModel(GaussianNetwork(SCHEDULE, 0.7, 0.5), schedule=SCHEDULE, shape=(2, 2, 2))
    return Distillation(teacher, teacher, load_config(base, words), SLOTS)


def filled(folder: Path, parts: Distillation, rank: int, last_call: int = 10**9) -> NoisyPool:
    """The pool of a rank, whose warm-up ends before the call after `last_call`."""
    network = parts.teacher.network

    def check(where: str) -> None:
        if getattr(network, "calls", -1) == last_call:
            raise Ended

    config, run = parts.config, RunFolder(folder)
    parts = going_on(parts, run.checkpoints, None)
    whole = SimpleNamespace(
        latest=None, trainer=config.trainer, config=config, folder=run, progress=False, check_stop=check
    )
    with (  # the ranks come here one after another, in one process
        patch("torch.distributed.new_group"),
        patch.object(Ranks, "gather", lambda self, own: [own]),
        patch.object(Ranks, "wait", lambda self: None),
    ):
        return prepare_pool(None, parts, whole, torch.device("cpu"), rank)


def tensors(pool: NoisyPool) -> dict[str, torch.Tensor]:
    return {name: getattr(pool, name) for name in ("x", "t", "updated")}


@pytest.mark.parametrize("mode", MODES)
def test_fewer_ranks_finish_every_warm_up_and_keep_all_its_states(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [filled(tmp_path / "whole", parts_for(4, mode, tmp_path), rank) for rank in range(4)]
    broken, made = parts_for(4, mode, tmp_path), parts_for(4, mode, tmp_path)
    for rank in (0, 1):
        filled(tmp_path / "run", made, rank)
    with pytest.raises(Ended):
        filled(tmp_path / "run", broken, 2, last_call=7)  # the fourth was killed before its first save
    parts = parts_for(1, mode, tmp_path)
    caplog.set_level("INFO", "ldm_dkdm")
    pool = filled(tmp_path / "run", parts, 0)
    assert caplog.messages == ["the warm-up of 3 ranks goes on, and is dealt to 1: 120 slots each, none is lost"]
    for name, found in tensors(pool).items():
        assert torch.equal(found, torch.cat([tensors(one)[name] for one in whole[:3]]))
    alone = parts_for(4, mode, tmp_path)
    filled(tmp_path / "alone", alone, 2)
    network = parts.teacher.network
    redone = broken.teacher.network.samples + network.samples - alone.teacher.network.samples
    assert redone == (0 if mode in MODES[:2] else 2 * 7)  # a sampler's batch of two samples begins again
    assert pool.facts["ranks"] == 1 and len(list((tmp_path / "run/checkpoints").glob("warmup.pool*"))) == 3


@pytest.mark.parametrize("mode", MODES)
def test_more_ranks_go_on_with_what_is_there_and_fill_pools_of_their_own(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = filled(tmp_path / "whole", parts_for(1, mode, tmp_path), 0)
    other = filled(tmp_path / "two", parts_for(2, mode, tmp_path), 1)
    with pytest.raises(Ended):
        filled(tmp_path / "run", parts_for(1, mode, tmp_path), 0, last_call=5)
    caplog.set_level("INFO", "ldm_dkdm")
    for rank, wanted in enumerate((whole, other)):
        pool = filled(tmp_path / "run", parts_for(2, mode, tmp_path), rank)
        assert all(torch.equal(found, tensors(wanted)[name]) for name, found in tensors(pool).items())
        assert pool.facts["ranks"] == 2
    line = "the warm-up of 1 rank goes on on 2: each fills a pool of its own, none is lost"
    assert caplog.messages == [line]


def test_a_plan_on_more_ranks_counts_the_pools_that_are_new(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(1, teacher_folder, tmp_path)
    assert planned(capsys, "--resume", run)["teacher calls, warm-up"].startswith("0 samples")
    assert int(planned(capsys, "--resume", run, "--devices", 2)["teacher calls, warm-up"].split()[0]) > 0


def test_ranks_that_see_other_warm_ups_end(tmp_path: Path) -> None:
    parts = parts_for(2, "ancestral", tmp_path)
    with (
        patch.object(Ranks, "gather", lambda self, own: [own, []]),
        patch("torch.distributed.new_group"),
        pytest.raises(UserError, match="the processes see different warm-ups"),
    ):
        pool_filling._together(going_on(parts, tmp_path, None).warmups, 0, 2)


def test_a_global_batch_over_other_ranks_keeps_the_pools_of_the_warm_up(tmp_path: Path) -> None:
    two = [filled(tmp_path / "run", parts_for(2, "harvest", tmp_path), rank) for rank in (0, 1)]
    smaller = replace(parts_for(4, "harvest", tmp_path), slots=SLOTS // 2)  # as many in all
    going = going_on(smaller, tmp_path / "run/checkpoints", None)
    assert [one.number for one in going.warmups] == [0, 1]
    assert (going.all_slots, going.own_slots, len(two[0])) == (80, 20, 40)


def run_of(ranks: int, teacher: Path, folder: Path) -> Path:
    """A run that as many ranks left after their warm-up."""
    base = write_yaml(folder / "base.yaml", distill_config(teacher, folder, trainer={"max_steps": 1}))
    config = load_config(base)
    model = load_model(config.teacher.ckpt)
    student = make_student(config.student, model, 0)
    several = replace(config, trainer=replace(config.trainer, devices=ranks))
    for rank in range(ranks):
        filled(folder / "run", assemble(model, student, several), rank)
    open_run(config, RunFolder(folder / "run"))
    return folder / "run"


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, str]:
    assert distil(*words, "--plan") == 0
    return {name: rest.strip() for name, rest in (x.split("  ", 1) for x in capsys.readouterr().out.splitlines())}


def test_a_plan_and_the_room_are_those_of_the_pools_that_a_resume_gets(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(4, teacher_folder, tmp_path)
    before = planned(capsys, "--base", tmp_path / "base.yaml", "logging.name=new")
    lines = planned(capsys, "--resume", run)
    size = 160 * (8 * 8 * 3 * 2 + 8)  # float16 states, t, time of the last update
    assert before["pool"].startswith("40 slots (dynamic), ") and before["teacher calls, warm-up"].startswith("40 ")
    assert lines["pool"] == f"160 slots (dynamic), {size / 1000:.1f} KB of host memory"
    assert lines["memory, host"] == f"{size / 1000:.1f} KB for the pool"
    assert lines["teacher calls, warm-up"] == "0 samples (ddim, what is left)"
    with monkeypatch.context() as machine:  # a machine with room for the configured pool
        limited = SimpleNamespace(sysconf=lambda name: 10 if "PHYS" in name else 6200, walk=os.walk)
        machine.setattr("ldm_dkdm.training.room.os", limited)
        assert distil("--resume", run) == 2
        error = capsys.readouterr().err
        assert "trainer.devices: a share of the run's pools of 160 slots takes" in error and "more devices" in error
    checkpoints = run / "checkpoints"
    warmed = [load_file(checkpoints / f"warmup.pool-rank{rank}.safetensors")["x"] for rank in range(4)]
    assert distil("--resume", run) == 0
    said = "the warm-up of 4 ranks goes on, and is dealt to 1: 160 slots each, none is lost"
    assert said in capsys.readouterr().out
    after = load_file(checkpoints / "step=00000001.pool-rank0.safetensors")
    kept = (after["updated"] == 0).nonzero().flatten()
    assert len(kept) == 160 - 4 and torch.equal(after["x"][kept], torch.cat(warmed)[kept])
    assert planned(capsys, "--resume", run, "trainer.max_steps=2")["pool"].startswith("160 slots")
    assert planned(capsys, "--resume", run, "trainer.max_steps=2", "--devices", 3)["pool"].startswith("54 slots")
    assert distil("--resume", run, "trainer.max_steps=2", "--plan", "--devices", 50) == 2
    assert "trainer.devices: 50 ranks are too many for the run's pool; each would have 3" in capsys.readouterr().err


def test_a_damaged_or_foreign_warm_up_of_another_rank_is_one_line_and_stays(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(2, teacher_folder, tmp_path)
    file = run / "checkpoints/warmup.pool-rank1.safetensors"
    whole = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["pool"])
    broken: dict[str, Callable[[], object]] = {
        "not a readable": lambda: file.write_bytes(whole[:100]),
        "filled must be 0 to slots, others 1 or more": lambda: save_file(
            load_file(file), file, {"pool": json.dumps({**header, "filled": 2, "ranks": 0})}
        ),
        "was filled with other settings": lambda: save_file(
            load_file(file), file, {"pool": json.dumps({**header, "ranks": 3})}
        ),
    }
    for words, damage in broken.items():
        damage()
        kept = file.read_bytes()
        assert distil("--resume", run) == 2
        error = capsys.readouterr().err
        assert words in error and "delete it to start the warm-up again" in error and error.count("\n") == 1
        assert file.read_bytes() == kept
        file.write_bytes(whole)
