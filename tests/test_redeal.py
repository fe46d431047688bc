"""Pools and plans for several ranks, without any: shares, dealing, memory, traffic."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints.pools import pool_files
from ldm_dkdm.config.schema import DistillConfig, TrainerConfig, WarmupConfig
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.redeal import redeal, share
from ldm_dkdm.distillation.warmup import warmup_of
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.training.ema import StudentEMA
from ldm_dkdm.training.several import sharded_memory, training_bytes
from tests.cli import distil, write_yaml
from tests.parts import distill_config

SHAPE = (1, 1, 1)


def saved(folder: Path, sizes: list[int], ranks: int | None = None) -> list[Path]:
    """Pools whose slots hold their number, as states, timesteps and labels."""
    first, files = 0, []
    for rank, size in enumerate(sizes):
        pool = NoisyPool(size, SHAPE, torch.float32, labeled=True)
        numbers = torch.arange(first, first + size)
        pool.fill(NoisyBatch(numbers.view(-1, *SHAPE).float(), numbers, numbers))
        pool.updated += numbers.int()
        pool.facts = {} if ranks is None else {"ranks": ranks}
        files.append(folder / f"step=00000003.pool-rank{rank}.safetensors")
        pool.save(files[-1], 3)
        first += size
    return files


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), ranks=st.integers(1, 5))
def test_every_slot_has_one_new_place_and_keeps_all_that_it_has(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], ranks: int
) -> None:
    files, seen = saved(tmp_path_factory.mktemp("pools"), sizes), []
    for rank in range(min(ranks, sum(sizes))):
        pool = NoisyPool(share(files, rank, ranks), SHAPE, torch.float32, labeled=True)
        redeal(pool, files, rank, ranks)
        assert pool.filled == len(pool)
        for other in (pool.x.flatten(), pool.label, pool.updated):
            assert torch.equal(other.int(), pool.t)
        seen += pool.t.tolist()
    assert sorted(seen) == list(range(sum(sizes)))


def test_pools_left_by_another_number_of_ranks_are_not_taken_for_this_saves(tmp_path: Path) -> None:
    files = saved(tmp_path, [2] * 12, ranks=11)
    assert pool_files(tmp_path, "step=00000003") == files[:11]  # 10 comes after 9, and 11 was left by a killed run
    files[4].unlink()
    with pytest.raises(UserError, match=r"pool-rank4\.safetensors: missing"):
        pool_files(tmp_path, "step=00000003")


def test_the_ranks_share_the_samples_of_a_warm_up() -> None:
    config = DistillConfig(4, rho=1.0, warmup=WarmupConfig("ddim", images=1000))
    assert [warmup_of(config, ranks).images for ranks in (1, 3, 8)] == [1000, 334, 125]
    assert warmup_of(DistillConfig(4, rho=1.0), 8) == WarmupConfig()  # slots are shared by their pools


def test_the_whole_average_of_shards_is_on_the_device_only_while_it_is_called() -> None:
    places: list[str] = []

    class Recorded(nn.Linear):
        def to(self, device):
            places.append(str(device))
            return self

    average = StudentEMA(0.9)
    average.lend(torch.device("cuda:0"))  # other ranks have none
    average.whole = Recorded(1, 1)
    for _ in range(2):
        average.lend(torch.device("cuda:0"))
        for _ in range(3):
            average.on_train_batch_start(None, None)
    assert places == ["cuda:0", "cpu"] * 2


@pytest.mark.parametrize("place", ["memory", "device", "mmap"])
def test_a_pool_on_a_device_needs_the_host_memory_of_its_saves(
    place: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))
    assert distil("--base", base, "--plan", f"distill.pool_storage={place}") == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert ("while it is saved" in lines["memory, host"]) == (place == "device")
    assert lines["memory, host"].strip().startswith("0 B") == (place == "mmap")
    monkeypatch.setattr("ldm_dkdm.training.room.os", SimpleNamespace(sysconf=lambda name: 10, walk=os.walk))
    code = distil("--base", base, f"distill.pool_storage={place}", "trainer.max_steps=1")
    assert code == (0 if place == "mmap" else 2)
    assert ("while it is saved, but there are" in capsys.readouterr().err) == (place == "device")


@pytest.mark.parametrize(
    ("device", "own", "waiting"), [("cuda", 0, "400 B for the shards, "), ("cpu", 100, "640 B for the whole model")]
)
def test_shards_that_wait_in_host_memory_are_not_on_the_device(device: str, own: int, waiting: str) -> None:
    trainer = TrainerConfig(1, 1e-3, devices=4, num_nodes=2, strategy="fsdp_cpu_offload", accelerator="cpu")
    assert training_bytes(40, trainer, torch.device(device)) == own  # 20 bytes of 40 parameters, shared by 8
    lines = sharded_memory(40, trainer, torch.device(device))
    assert lines[0].startswith(waiting)
    assert lines[-2:] == [
        "640 B for the whole model of every process, on each machine",
        "160 B for the whole average and 640 B for a checkpoint while it is saved, on the first machine",
    ]


@pytest.mark.parametrize(
    ("strategy", "sent", "resident"),
    [("ddp", "5.5 MB", "19.8 MB"), ("fsdp", "16.6 MB", "5.9 MB")],
)
def test_a_plan_of_8_machines_gives_memory_traffic_and_time_of_a_device(
    strategy: str, sent: str, resident: str, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))
    world, keys = ("--nodes", 8, "--devices", 8), (f"trainer.strategy={strategy}", "trainer.accumulate=2")
    assert distil("--base", base, "--plan", *world, "trainer.num_nodes=8", *keys) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    # all-reduce: 2 * 63/64 of 4 * 702,499 bytes; shards: 3 * 63/64 in each of 2 batches
    assert lines["traffic"].strip().startswith(f"{sent} a step from each device: 0.0")
    assert lines["memory, device"].strip().startswith(f"{resident} on cpu")
    assert ("2.8 MB for the whole average" in lines["memory, host"]) == (strategy == "fsdp")  # 4 * 702,499 bytes
    for words in ("22.5 MB for the whole model of every", "11.2 MB for a checkpoint while it is saved"):
        assert (words in lines["memory, host"]) == (strategy == "fsdp")  # 8 and 4 times those bytes
    assert "on each of 64 devices on 8 machines" in lines["time"]
    assert lines["time"].endswith("; the traffic between the devices is not in it")
    assert not (tmp_path / "run").exists()
