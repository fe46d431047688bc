"""Two processes on one machine: a pool per rank, one student, an exact resume."""

import runpy
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from tests.cli import ROOT, table, write_yaml
from tests.parts import distill_config
from tests.prepared import begin, ended

PARTS = ("ckpt", "ckpt.sha256", "pool-rank0.safetensors", "pool-rank1.safetensors")  # of a checkpoint


def script(*arguments: str) -> None:
    """Run scripts/dkdm_ldm.py; Lightning starts the second process with the same command line."""
    file = str(ROOT / "scripts" / "dkdm_ldm.py")
    with patch.object(sys, "argv", [file, *arguments]):
        runpy.run_path(file, run_name="__main__")


def distil_in_two_processes(*arguments: str, printed: Path) -> str:
    """What both print, when they end well."""
    process = begin(script, *arguments, printed=printed)
    assert ended(process, 280) == 0, printed.read_text()
    return printed.read_text()


@pytest.mark.timeout(900)
def test_two_ranks_distil_one_student_from_their_own_pools_and_resume_exactly(
    teacher_folder: Path, tmp_path: Path
) -> None:
    config = distill_config(
        teacher_folder,
        tmp_path,
        trainer={"devices": 2, "max_steps": 4},
        logging={"name": "whole", "save_every": 2, "evaluate_every": 2, "log_every": 1},
    )
    base = write_yaml(tmp_path / "whole.yaml", config)
    done = distil_in_two_processes("--base", str(base), printed=tmp_path / "whole.log")
    assert done.count("student: ") == 1
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "student")
    for part in PARTS:
        (tmp_path / "halves" / "checkpoints" / f"step=00000004.{part}").unlink()
    done = distil_in_two_processes("--resume", str(tmp_path / "halves"), printed=tmp_path / "halves.log")
    assert done.count("continues from the checkpoint of step 2") == 1
    whole, halves = (load_file(tmp_path / name / "student" / "student.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    rows = [table(tmp_path / name / "metrics.csv") for name in ("whole", "halves")]
    assert [row["step"] for row in rows[0]] == ["1", "2", "3", "4"]
    for name in ("step", "loss", "agreement", "psnr"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    assert [bool(row["agreement"]) for row in rows[0]] == [False, True, False, True]
    pools = [
        [load_file(tmp_path / name / "checkpoints" / f"step=00000004.pool-rank{rank}.safetensors") for rank in (0, 1)]
        for name in ("whole", "halves")
    ]
    assert not torch.equal(pools[0][0]["x"], pools[0][1]["x"])
    for rank in (0, 1):
        assert torch.equal(pools[0][rank]["x"], pools[1][rank]["x"])
