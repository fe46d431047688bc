"""Layouts of diffusers' folders, and options of its networks, against the library itself."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel, VQModel
from safetensors.torch import load_file

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.weight_files import weights_in
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.load import load_config
from ldm_dkdm.reporting import names_apart
from tests.cli import run_script, sample
from tests.parts import randomised
from tests.test_diffusers_format import BASE, outputs

NAME = "diffusion_pytorch_model"


def pipeline(folder: Path, scale: float = 1.0, **options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    network = randomised(UNet2DModel(**BASE)).eval()
    network.conv_out.weight.data *= scale
    DDPMPipeline(network, DDPMScheduler(40)).save_pretrained(folder, **options)
    return network


def test_a_square_sample_size_may_be_a_pair(tmp_path: Path) -> None:
    DDPMPipeline(UNet2DModel(**{**BASE, "sample_size": (16, 16)}), DDPMScheduler(40)).save_pretrained(tmp_path)
    assert load_model(tmp_path).shape == (3, 16, 16)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": [16, 32]}))
    with pytest.raises(UserError, match=r"unet/config.json: sample_size: \[16, 32\]"):
        load_model(tmp_path)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_and_hashed_whole(safe: bool, variant: str | None, tmp_path: Path) -> None:
    options = {"max_shard_size": "200KB", "safe_serialization": safe, "variant": variant}
    theirs = pipeline(tmp_path, **options)
    model = load_model(tmp_path)
    assert outputs(model.network, theirs, None) < 1e-4
    assert model.file is not None and model.file.suffix == ".json"
    shards = sorted((tmp_path / "unet").glob("*-of-*"))
    assert len(shards) > 2
    assert sha256(model.file) == hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}: missing"):
        load_model(tmp_path)
    model.file.unlink()
    with pytest.raises(UserError, match="without their index"):
        load_model(tmp_path)


def test_the_file_that_diffusers_takes_is_read_and_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    theirs = pipeline(tmp_path)
    good = weights_in(folder)
    for name in (f"{NAME}.bin", f"{NAME}.fp16.safetensors", f"{NAME}.non_ema.safetensors", "a.safetensors"):
        shutil.copy(good, folder / name)
    assert weights_in(folder) == good
    assert outputs(load_model(tmp_path).network, theirs, None) < 1e-4
    for gone, left in (
        (f"{NAME}.safetensors", f"{NAME}.bin"),
        (f"{NAME}.bin", None),
        ("a.safetensors", f"{NAME}.fp16.safetensors"),
        (f"{NAME}.fp16.safetensors", f"{NAME}.non_ema.safetensors"),
    ):
        (folder / gone).unlink()
        if left is None:
            with pytest.raises(UserError, match="several weight files"):
                weights_in(folder)
            assert load_model(folder / f"{NAME}.fp16.safetensors").file == folder / f"{NAME}.fp16.safetensors"
        else:
            assert weights_in(folder).name == left


def test_parts_in_the_root_are_read(tmp_path: Path) -> None:
    theirs = pipeline(tmp_path)
    for part in ("unet", "scheduler"):
        for path in (tmp_path / part).iterdir():
            shutil.move(path, tmp_path / path.name)
        (tmp_path / part).rmdir()
    assert outputs(load_model(tmp_path).network, theirs, None) < 1e-4
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"scheduler_config.json: is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("around", [True, False])
def test_a_trainer_s_checkpoint_has_raw_and_ema_weights(around: bool, tmp_path: Path) -> None:
    raw = pipeline(tmp_path / "run")
    inner = tmp_path / "run" / "checkpoint-500"
    raw.save_pretrained(inner / "unet")
    ema = pipeline(tmp_path / "other", 3.0)
    ema.save_pretrained(inner / "unet_ema")
    (inner / "optimizer.bin").write_bytes(b"x")
    hints: dict[str, Any] = {}
    if not around:
        (tmp_path / "run" / "model_index.json").unlink()
        hints = {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_timesteps": 40}
        with pytest.raises(UserError, match="stores no noise schedule"):
            load_model(inner)
    for path, use_ema, theirs in (
        (inner, None, ema),
        (inner, False, raw),
        (inner / "unet", None, raw),
        (inner / "unet_ema", None, ema),
        (inner / "unet_ema" / f"{NAME}.safetensors", None, ema),
    ):
        model = load_model(path, use_ema=use_ema, **hints)
        assert outputs(model.network, theirs, None) < 1e-4
        assert model.diffusion.schedule == "linear" and model.diffusion.num_timesteps == 40
        assert model.file is not None
        assert torch.equal(load_file(model.file)["conv_out.weight"], theirs.conv_out.weight)


def test_a_pipeline_of_another_transformer_is_refused_by_name(tmp_path: Path) -> None:
    index = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(UserError, match=r"PixArtAlphaPipeline is not .*its network is a PixArtTransformer2DModel"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_first_stages_without_attention_decode_as_the_library_s(kind: Any, tmp_path: Path) -> None:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "mid_block_add_attention": False, **kinds}
    torch.manual_seed(0)
    theirs = randomised(kind(**options)).eval()
    theirs.save_pretrained(tmp_path)
    codec = FirstStageSource(tmp_path).codec(8)
    z = torch.randn(2, codec.latent_channels, 8, 8)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        if kind is VQModel:
            z = codec.autoencoder.quantise(z)[0]
            encoded = theirs.encode(x).latents
        else:
            encoded = theirs.encode(x).latent_dist.mean
        wanted, found = theirs.decode(z).sample, codec.autoencoder.decode(z)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
        torch.testing.assert_close(codec.autoencoder.encode(x), encoded, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_the_weights_of_a_first_stage_stand_for_their_folder(
    kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind(block_out_channels=(32,), scaling_factor=0.5, sample_size=8).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / f"{NAME}.safetensors"
    other = shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    for path in (file, Path(other)):
        codec, folder = FirstStageSource(path).codec(8), FirstStageSource(file.parent).codec(8)
        assert codec.scale_factor == 0.5 and codec.params == folder.params
        assert FirstStageSource(path, 0.25).codec(8).scale_factor == 0.25
    assert run_script("inspect_checkpoint.py", file) == 0
    assert "weights in a first-stage folder" in capsys.readouterr().out
    assert run_script("inspect_checkpoint.py", file, "--config") == 0
    assert str(file) in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is a first stage, not a diffusion model; it belongs in first_stage.ckpt"):
        load_model(file)
    alone = Path(shutil.copy(file, tmp_path / "alone.safetensors"))
    for opened in (lambda: FirstStageSource(alone).codec(8), lambda: load_model(alone)):
        with pytest.raises(UserError, match=r"alone.safetensors: is diffusers' first stage without the config.json"):
            opened()
    assert run_script("inspect_checkpoint.py", alone) == 2
    assert "name the folder that holds both" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [None, 0.18215, 1.7])
def test_the_scale_of_latents_is_the_config_s(
    scale: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An absent one means 1 in a VQModel, as in CompVis's files, and a line says so."""
    VQModel(block_out_channels=(32,), scaling_factor=scale or 1.0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if scale is None:
        del config["scaling_factor"]
    path.write_text(json.dumps(config))
    codec = FirstStageSource(tmp_path).codec(8)
    assert codec.scale_factor == (scale or 1.0)
    assert ("config.json: stores no scaling_factor; 1 is taken" in caplog.text) == (scale is None)
    assert bool(codec.doubt) == (scale in (None, 0.18215))  # the class's default, which may not be meant


def test_a_hub_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "hub" / "models--someone--small-model"
    theirs = pipeline(home / "snapshots" / "abc")
    pipeline(home / "snapshots" / "later", 2.0)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    assert outputs(load_model("someone/small-model").network, theirs, None) < 1e-4
    with pytest.raises(UserError, match=r"hf download someone/other"):
        load_model("someone/other")


def test_models_of_the_hub_s_cache_are_called_as_they_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "hub" / "models--me--pipe"
    for name in ("abc", "def"):
        pipeline(home / "snapshots" / name)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (home / "blobs").mkdir()
    weights = home / "snapshots" / "def" / "unet" / f"{NAME}.safetensors"
    weights.symlink_to(weights.rename(home / "blobs" / "0006"))
    Path("mine").symlink_to(home / "snapshots" / "def")
    asked = ("-n", 1, "-c", 1, "--no_png")
    assert sample("-r", "me/pipe", *asked) == 0 and Path("logs/samples/me-pipe/grid.png").is_file()
    both = ("me/pipe", home / "snapshots" / "def", "mine")
    capsys.readouterr()
    assert sample("-r", *both, *asked) == 0
    labels = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "parameters" in line]
    assert labels == ["me/pipe-abc", "me/pipe-def", f"{tmp_path.name}/mine"]
    assert names_apart([weights]) == [f"unet/{NAME}.safetensors"]


def test_a_folder_that_describes_itself_replaces_a_recipe_s_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline(tmp_path)
    config = load_config("configs/celebahq256.yaml", [f"teacher.ckpt={tmp_path}"])
    assert open_teacher(config).shape == (3, 16, 16)
    assert "the recipe's diffusion, first_stage, teacher.params, teacher.target are not used" in caplog.text
    config = load_config("configs/celebahq256.yaml", [f"teacher.ckpt={tmp_path}", "diffusion.num_timesteps=50"])
    with pytest.raises(UserError, match=r"diffusion.num_timesteps: 50"):
        open_teacher(config)
