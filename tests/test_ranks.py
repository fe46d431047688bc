"""Several processes: two agents on loopback, SLURM's variables, killed ranks, another number of ranks, shards."""

import os
import shutil
import socket
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_dkdm.checkpoints.pools import pool_header
from ldm_dkdm.commands import drawing
from ldm_dkdm.distillation.pool import NoisyPool
from tests import rank_worker
from tests.cli import contents, sample, table, write_yaml
from tests.cli import run_script as script
from tests.parts import distill_config, first_stage_folder, model_folder
from tests.prepared import begin, ended
from tests.test_warmup_dealt import run_of

CLEARED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def variables(**own: object) -> dict[str, str]:
    """Those of this process without a launcher's, and `own`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CLEARED)}
    return kept | {name: str(value) for name, value in own.items()}


def all_ended(processes: Sequence[tuple[BaseProcess, Path]]) -> list[tuple[int, str]]:
    """Exit codes of all, and what they have printed."""
    return [(ended(process), printed.read_text()) for process, printed in processes]


def agents(folder: Path, *scenarios: str, nodes: int = 2, each: int = 1) -> list[tuple[int, str]]:
    """torchrun, once on every machine; here they are all on this one."""
    where = ["--nnodes", str(nodes), "--nproc_per_node", str(each), "--master_addr", "127.0.0.1"]
    where += ["--master_port", str(free_port())]
    started = []
    for node in range(nodes):
        given, printed = [*where, "--node_rank", str(node)], folder / f"agent-{scenarios[0]}-{node}.log"
        work = (rank_worker.agent, given, folder, *scenarios)
        started.append((begin(*work, printed=printed, environment=variables()), printed))
    return all_ended(started)


def srun(folder: Path, *scenarios: str, tasks: int = 2) -> list[tuple[int, str]]:
    """Processes with the variables that srun gives to its tasks."""
    shared = {"SLURM_NTASKS": tasks, "SLURM_NNODES": 1, "SLURM_NODEID": 0, "SLURM_JOB_ID": 71, "SLURM_JOB_NAME": "x"}
    shared |= {"SLURM_STEP_ID": 0, "SLURM_NODELIST": "localhost", "MASTER_PORT": free_port()}
    started = []
    for rank in range(tasks):
        printed = folder / f"task-{scenarios[0]}-{rank}.log"
        own = variables(**shared, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        started.append((begin(rank_worker.work, folder, *scenarios, printed=printed, environment=own), printed))
    return all_ended(started)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two agents of one process each leave."""
    home = tmp_path_factory.mktemp("ranks")
    teacher = model_folder(home / "teacher", first_stage_folder(home / "vq"))
    logging = {"evaluate_every": 0, "sample_every": 3, "log_every": 1}
    trainer = {"max_steps": rank_worker.STEPS, "grad_clip": 1.0}
    config = distill_config(teacher, home, trainer=trainer, logging=logging)
    config["student"]["params"] |= {"channel_mult": [1], "attention_resolutions": [1]}  # shards take long by the tensor
    write_yaml(home / "base.yaml", config)
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    np.savez(home / "reference.npz", arr_0=images)
    file = run_of(3, teacher, home / "three") / "checkpoints/warmup.pool-rank2.safetensors"
    emptied = NoisyPool(40, (3, 8, 8))
    emptied.facts = {"ranks": 3}
    emptied.save(file, 0, pool_header(file)["origin"])
    fixed = ("split", "shards", "split-parts", "shards-parts")
    runs = ("ddp", "fsdp", "halves", "best", "early", *fixed, "flipped", "three")
    stop_sampling(home / "teacher", home / "samples-rest", 3)
    for code, error in agents(home, "sample", "sample-rest", "evaluate", *runs):
        assert code == 0, error
    return home


def student(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "student.safetensors")


def checkpoint(folder: Path, name: str) -> dict[str, object]:
    return torch.load(folder / name / "checkpoints" / "step=00000006.ckpt", weights_only=True)


def moments(folder: Path, name: str) -> torch.Tensor:
    """Adam's means of the gradients, which are linear in them."""
    states = checkpoint(folder, name)["optimizer_states"][0]["state"]
    return torch.cat([states[key]["exp_avg"].flatten() for key in sorted(states)]).double()


def weights(folder: Path, name: str) -> torch.Tensor:
    return torch.cat([w.flatten() for w in checkpoint(folder, name)["current_model_state"].values()]).double()


@pytest.mark.timeout(600)
def test_two_agents_train_one_student_whose_weights_are_equal_after_every_step(folder: Path) -> None:
    seen = [(folder / f"ddp-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == rank_worker.STEPS  # every step changes them
    pools = [load_file(folder / "ddp" / "checkpoints" / f"step=00000006.pool-rank{r}.safetensors") for r in (0, 1)]
    assert not torch.equal(pools[0]["x"], pools[1]["x"])
    assert [row["step"] for row in table(folder / "ddp" / "metrics.csv")] == list("123456")  # rank 0 alone writes
    for rank in (0, 1):  # no step waits for a device: the two saves ask, and Lightning before the first step
        calls = (folder / f"ddp-{rank}.reductions").read_text().split()
        assert calls.count("reduce_boolean_decision") == 2
        assert calls.index("reduce_boolean_decision") >= len(calls) - 4


@pytest.mark.timeout(600)
def test_two_ranks_at_a_batch_are_one_rank_at_twice_the_batch(folder: Path) -> None:
    rank_worker.train_on_fixed_batches(folder, "whole")
    scale = moments(folder, "whole").abs().max()
    for name in ("split", "shards", "split-parts", "shards-parts"):  # parts: gradients of two batches are accumulated
        assert (moments(folder, name) - moments(folder, "whole")).abs().max() < (
            3e-5 if "parts" in name else 1e-5
        ) * scale
        assert (weights(folder, name) - weights(folder, "whole")).abs().max() < 2e-4  # the rate is 1e-3, 6 steps


@pytest.mark.timeout(600)
def test_shards_train_the_student_of_ddp(folder: Path) -> None:
    ddp, fsdp = student(folder / "ddp"), student(folder / "fsdp")
    assert ddp.keys() == fsdp.keys()
    assert max((ddp[name] - fsdp[name]).abs().max() for name in ddp) < 2e-4
    assert (moments(folder, "fsdp") - moments(folder, "ddp")).abs().max() < 1e-5 * moments(folder, "ddp").abs().max()
    rows = [table(folder / name / "metrics.csv") for name in ("ddp", "fsdp")]
    for one, other in zip(*rows, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-4)
    assert (folder / "fsdp" / "samples" / "step=00000003.png").is_file()


def test_shards_that_stop_and_go_on_are_those_that_do_not(folder: Path) -> None:
    whole, halves = student(folder / "fsdp"), student(folder / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_best_window_of_shards_exports_the_weights_of_its_end(folder: Path) -> None:
    best, last = student(folder / "best"), student(folder / "fsdp")  # the only window ends with the run
    assert all(torch.equal(best[name], last[name]) for name in last)


def test_an_early_stop_ends_both_ranks_at_one_step(folder: Path) -> None:
    saved = [file.name for file in sorted((folder / "early" / "checkpoints").iterdir())][-4:]
    ends = ("ckpt", "ckpt.sha256", "pool-rank0.safetensors", "pool-rank1.safetensors")
    assert saved == [f"step=00000004.{end}" for end in ends]


@pytest.mark.timeout(600)
def test_a_rank_is_killed_and_the_restarted_run_makes_the_student_of_an_undisturbed_one(folder: Path) -> None:
    (code, error), (killed, _) = agents(folder, "killed")
    assert code != 0 and killed != 0
    assert "another process of the run has ended or does not answer" in error
    assert not (folder / "killed-0.txt").exists()
    names = sorted(file.name for file in (folder / "killed" / "checkpoints").iterdir() if file.name[0] != ".")
    ends = ("ckpt", "ckpt.sha256", "pool-rank0.safetensors", "pool-rank1.safetensors")
    assert names == [f"step=00000003.{end}" for end in ends]
    for code, error in srun(folder, "resumed"):  # another launcher makes no difference
        assert code == 0, error
    resumed, whole = student(folder / "killed"), student(folder / "ddp")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    losses = [float(row["loss"]) for row in table(folder / "ddp" / "metrics.csv")]  # of each step, of both ranks
    rows = {row["step"]: float(row["loss"]) for row in table(folder / "killed" / "metrics.csv")}
    assert rows["4"] == pytest.approx((losses[2] + losses[3]) / 2, rel=1e-5)  # a checkpoint was within this window


def test_a_damaged_pool_of_one_rank_ends_all_in_one_line_and_the_next_start_goes_on_before_it(folder: Path) -> None:
    lines = [(folder / f"flipped-0-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert lines[0] == lines[1] and len(lines[0]) == 1
    assert "error: " in lines[0][0] and "step=00000006.pool-rank1.safetensors: is damaged" in lines[0][0]
    assert "(rank 0 from step 6, rank 1 from step 3); start the run again: it continues from step 3" in lines[0][0]
    names = [file.name for file in (folder / "flipped" / "checkpoints").glob("*.ckpt*")]
    assert {"step=00000006.ckpt.damaged", "step=00000007.ckpt"} <= set(names)
    assert "error" not in (folder / "flipped-1-0.txt").read_text()


def test_a_run_goes_on_with_another_number_of_ranks_and_keeps_every_slot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "fsdp", tmp_path / "run")
    saved = [load_file(tmp_path / "run" / "checkpoints" / f"step=00000006.pool-rank{r}.safetensors") for r in (0, 1)]
    arguments = ("trainer.strategy=ddp", "logging.sample_every=1000", "trainer.max_steps=7")
    assert script("dkdm_ldm.py", "--resume", tmp_path / "run", *arguments) == 0
    assert "the pools of 2 ranks are dealt to 1: 80 slots each, none is lost" in capsys.readouterr().out
    after = load_file(tmp_path / "run" / "checkpoints" / "step=00000007.pool-rank0.safetensors")
    kept = (after["updated"] <= 6).nonzero().flatten()
    assert len(kept) == 80 - 4  # one batch was drawn
    before = torch.cat([pool["x"] for pool in saved])
    assert torch.equal(after["x"][kept], before[kept])
    assert script("dkdm_ldm.py", "--resume", tmp_path / "run", "trainer.max_steps=8") == 0  # on as many ranks again
    assert len(load_file(tmp_path / "run" / "checkpoints" / "step=00000008.pool-rank0.safetensors")["x"]) == 80


def test_two_ranks_finish_the_warm_up_of_three_and_share_its_pools(folder: Path) -> None:
    checkpoints = folder / "three" / "run" / "checkpoints"
    pools = [load_file(checkpoints / f"step=00000001.pool-rank{rank}.safetensors") for rank in (0, 1)]
    assert [len(pool["x"]) for pool in pools] == [60, 60]
    new = run_of(3, folder / "teacher", folder / "again") / "checkpoints"
    files = [load_file(new / f"warmup.pool-rank{rank}.safetensors") for rank in range(3)]
    whole = torch.cat([file["x"] for file in files])
    for rank, pool in enumerate(pools):
        kept = pool["updated"] == 0
        assert kept.sum() == 60 - 4 and torch.equal(pool["x"][kept], whole[rank::2][kept])
    assert not list(checkpoints.glob("warmup*"))


def test_sampling_over_ranks_is_sampling_in_one_process_and_goes_on_after_a_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, drawn = stop_sampling(folder / "teacher", tmp_path / "one", 4), []
    batches = drawing.sample_batches
    monkeypatch.setattr(drawing, "sample_batches", lambda *given: (drawn.append(given[2]), batches(*given))[1])
    assert sample(*arguments) == 0
    assert drawn == [[16, 20]]
    assert "goes on after 4 of 6 batches" in capsys.readouterr().out
    assert contents(tmp_path / "one") == contents(folder / "samples-ranks")
    assert contents(folder / "samples-rest") == contents(folder / "samples-ranks")  # one began it, two went on


def stop_sampling(model: Path, out: Path, batches: int) -> tuple[object, ...]:
    """Draw the worker's images in this process and stop after some batches; returns the command line."""
    drawn, options = drawing.sample_batches, ("-n", 23, "-c", 2, "--batch_size", 4, "--npz", "--latents")
    arguments = ("-r", model, *options, "--device", "cpu", "-l", out)
    stop = patch.object(drawing, "sample_batches", lambda *given: stopping(drawn(*given), batches))
    with stop, pytest.raises(ZeroDivisionError):
        sample(*arguments)
    return arguments


def stopping(batches, count: int):
    for number, batch in enumerate(batches):
        if number == count:
            raise ZeroDivisionError
        yield batch


def test_an_evaluation_over_ranks_has_the_figures_of_one_process(folder: Path, tmp_path: Path) -> None:
    options = ("--metrics", "pixel-frechet", "-n", 70, "-c", 1, "--batch_size", 16, "--device", "cpu")
    files = ("--cache", tmp_path / "cache", "--results", tmp_path / "one.csv")
    assert script("evaluate.py", folder / "teacher", folder / "reference.npz", *options, *files) == 0
    (ranks,), (one,) = table(folder / "ranks.csv"), table(tmp_path / "one.csv")
    assert float(ranks["pixel Frechet"]) == pytest.approx(float(one["pixel Frechet"]), rel=1e-12)
    assert not list((folder / "cache").glob("*.partial.npz"))
