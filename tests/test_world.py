"""How processes were started: the world that launchers' variables mean, and what does not fit it."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from ldm_dkdm.device import started
from tests.cli import run_script as script
from tests.cli import write_yaml
from tests.parts import distill_config
from tests.test_ranks import CLEARED

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "RANK": "3"}
BATCH = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SRUN = {**BATCH, "SLURM_STEP_ID": "0"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith((*CLEARED, "TORCHELASTIC", "OMPI", "PMI"))]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({**TORCHRUN, "LOCAL_RANK": "1"}, ("torchrun", 2, 2, 3, 1, 1)),
        (SRUN, ("srun", 2, 2, 3, 1, 1)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, ("srun", 1, 2, 3, 1, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ("RANK and WORLD_SIZE", 1, 2, 1, 0, 1)),  # Kubeflow, without torchrun
        ({**SRUN, "SLURM_JOB_NAME": "interactive"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # salloc's shell
        ({**BATCH, "SLURM_PROCID": "0"}, None),  # a batch script that does not call srun
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, None),  # Lightning's own process
        ({"RANK": "0", "WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": "1"}, None),
    ],
)
def test_the_world_is_the_one_that_was_started(
    variables: Mapping[str, str], found: tuple | None, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    world = started()
    assert (None if world is None else tuple(vars(world).values())) == found


@pytest.mark.parametrize(
    ("variables", "override", "message"),
    [
        (TORCHRUN, "trainer.devices=3", "trainer.devices: 3 (and num_nodes: 2), but torchrun started 2 processes"),
        (TORCHRUN, ["--devices", "3"], "trainer.devices: 3 (and num_nodes: 2), but torchrun started 2 processes"),
        ({}, ["--nodes", "2", "trainer.num_nodes=4"], "--nodes: 2, and trainer.num_nodes: 4 as an override; give one"),
        ({}, ["trainer={devices: 3}", "--devices=2"], "--devices: 2, and trainer.devices: 3 as an override; give one"),
        ({}, ["--devices", "2", "--devices", "3"], "--devices: given as 2 and as 3; give it once"),
        ({}, ["--nodes", "two"], "--nodes: 'two' is not a whole number"),
        ({}, ["--nodes", "0"], "trainer.num_nodes: must be at least 1, got 0"),
        (SRUN, "trainer.num_nodes=1", "trainer.num_nodes: 1 (and devices: 2), but srun started 2 processes on each of"),
        ({}, "trainer.num_nodes=2", "trainer.num_nodes: 2 machines, and nothing tells this process which it is on"),
        ({**SRUN, "SLURM_NTASKS": "3"}, "trainer.seed=1", "srun started 3 processes on 2 machines; start as many on"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "trainer.seed=1", "mpirun started 2 processes; start them with torchrun or"),
        ({}, "trainer.strategy=dpp", "trainer.strategy: 'dpp' is not one of auto, ddp,"),
        ({}, "trainer.strategy=deepspeed_stage_2", "trainer.strategy: deepspeed_stage_2 writes checkpoints that it"),
        ({}, "trainer.strategy=ddp_spawn", "trainer.strategy: ddp_spawn copies this process"),
        (
            TORCHRUN,
            ["trainer.strategy=fsdp", "trainer.compile=true"],
            "trainer.compile: true cannot be kept with strategy",
        ),
        (TORCHRUN, "trainer.strategy=single_device", "trainer.strategy: single_device is for one process, and there"),
    ],
)
def test_another_world_or_strategy_is_refused_before_anything_is_written(
    variables: Mapping[str, str],
    override: str | list[str],
    message: str,
    teacher_folder: Path,
    tmp_path: Path,
    environment: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr("ldm_dkdm.commands.main.PATIENCE", 0.0)
    assert script("dkdm_ldm.py", "--base", base, *([override] if isinstance(override, str) else override)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_of_several_processes_the_first_alone_plans(
    teacher_folder: Path, tmp_path: Path, environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))
    timed: list[object] = []
    environment.setattr("ldm_dkdm.training.plan.time_needed", lambda parts: timed.append(parts) or {"time": "1 s"})
    for name, value in {**TORCHRUN, "LOCAL_RANK": "1"}.items():
        environment.setenv(name, value)
    for rank in (3, 0):
        environment.setenv("RANK", str(rank))
        assert script("dkdm_ldm.py", "--base", base, "--plan") == 0
        printed = capsys.readouterr()
        assert (printed.out + printed.err == "", len(timed)) == ((True, 0) if rank else (False, 1))


def test_a_global_batch_is_divided_over_the_world_and_stays_when_the_ranks_change(
    teacher_folder: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    from ldm_dkdm import load_config
    from ldm_dkdm.training.run_folder import RunFolder, open_run

    config = distill_config(teacher_folder, tmp_path, distill={"global_batch_size": 8})
    del config["distill"]["batch_size"]
    base = write_yaml(tmp_path / "base.yaml", config)
    one = load_config(base)
    assert one.distill.batch_size == 8
    open_run(one, RunFolder(tmp_path / "run"))
    for name, value in {**SRUN, "SLURM_PROCID": "0"}.items():
        environment.setenv(name, value)
    four = load_config(tmp_path / "run" / "config.yaml")
    assert four.distill.batch_size == 2
    open_run(four, RunFolder(tmp_path / "run"))  # refuses another configuration
