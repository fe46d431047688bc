"""Files of a pipeline of diffusers that are named in place of its folder, and files that it lacks."""

import json
from pathlib import Path

import pytest

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from tests.cli import run_script
from tests.test_diffusers_folders import NAME, pipeline


def test_shards_and_descriptions_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(tmp_path / "pipe", max_shard_size="1MB")
    unet = tmp_path / "pipe" / "unet"
    index = unet / f"{NAME}.safetensors.index.json"
    assert run_script("inspect_checkpoint.py", index) == 0 and "index of " in capsys.readouterr().out
    shard = next(unet.glob("*-00001-of-*"))
    for path, words in (
        (shard, f"is one of several shards; name their index, {index}"),
        (unet / "config.json", f"name its folder, {unet}"),
        (tmp_path / "pipe" / "model_index.json", f"name its folder, {tmp_path / 'pipe'}"),
    ):
        with pytest.raises(UserError, match=f"{path}: .*{words}$"):
            load_model(path)


def test_what_a_pipeline_lacks_is_named(tmp_path: Path) -> None:
    pipeline(tmp_path / "pipe")
    weights = tmp_path / "pipe" / "unet" / f"{NAME}.safetensors"
    weights.unlink()
    weights.symlink_to("/nonexistent/blob")
    with pytest.raises(UserError, match=f"unet: {NAME}.safetensors is a link to /nonexistent/blob, which is missing"):
        load_model(tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(UserError, match=r"vqvae: is missing; the pipeline's model_index\.json lists this first stage"):
        FirstStageSource(tmp_path / "pipe").codec()
