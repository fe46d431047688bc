"""Hostile content in a run's own files: the checkpoint, its pool, the config in the folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_dkdm import NoisyPool, UserError
from ldm_dkdm.training.resuming import read_checkpoint
from tests.cli import distil, write_yaml
from tests.hostile_content import in_legacy, in_zip, shared_key
from tests.parts import distill_config
from tests.prepared import begin, ended


@pytest.mark.parametrize("form", [in_zip, in_legacy])
def test_a_checkpoint_that_would_be_hashed_for_ever_is_refused(form: object, tmp_path: Path) -> None:
    (tmp_path / "step=00000001.ckpt").write_bytes(form(shared_key()))
    reading = begin(read_checkpoint, tmp_path / "step=00000001.ckpt", printed=tmp_path / "printed")
    assert ended(reading, 120) == 1
    printed = (tmp_path / "printed").read_text()
    assert "UserError" in printed and "share their content" in printed


def test_a_pool_with_deep_metadata_is_refused(tmp_path: Path) -> None:
    pool = NoisyPool(2, (1, 2, 2))
    save_file({"x": pool.x, "t": torch.zeros(2, dtype=torch.int32)}, tmp_path / "p.safetensors", {"pool": "[" * 99_999})
    with pytest.raises(UserError, match=r"p\.safetensors: not a readable pool file"):
        pool.load(tmp_path / "p.safetensors")


def test_a_deep_config_in_a_run_folder_is_one_line(teacher_folder: Path, tmp_path: Path, capsys) -> None:
    base = write_yaml(tmp_path / "c.yaml", distill_config(teacher_folder, tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: " + "[" * 100_000)
    assert distil("--base", base) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "config.yaml" in line and "nests more than" in line
