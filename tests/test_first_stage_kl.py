"""KL first stages: equality with diffusers' AutoencoderKL, CompVis's files, latent DiTs with a learned variance."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Theirs
from safetensors.torch import load_file

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.first_stage import AutoencoderKL, VQModel
from ldm_dkdm.networks import DiT, UNet
from tests.cli import distil, run_script, sample, write_yaml
from tests.parts import (
    DDCONFIG,
    DIFFUSION,
    UNET_PARAMS,
    distill_config,
    model_folder,
    randomised,
    write_compvis_checkpoint,
)
from tests.test_foreign import run_with

KL_PARAMS = {"ddconfig": {**DDCONFIG, "double_z": True}, "embed_dim": 3}
GIVEN = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
DIT = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2}


def write_vae(folder: Path, attends: bool = False, **options: object) -> Path:
    """A folder that diffusers writes: 32x32 images, 8x8x3 latents; attention at side 8 if wanted."""
    theirs = Theirs(
        down_block_types=["DownEncoderBlock2D"] * 2 + [f"{'Attn' * attends}DownEncoderBlock2D"],
        up_block_types=[f"{'Attn' * attends}UpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 32, 64],
        latent_channels=3,
        sample_size=32,
        scaling_factor=0.5,
        **options,
    )
    randomised(theirs).save_pretrained(folder)
    return folder


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return write_vae(tmp_path / "vae")


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attends": True},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"use_post_quant_conv": False},
        {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
    ],
)
def test_latents_and_images_equal_diffusers(options: dict[str, Any], tmp_path: Path) -> None:
    vae = write_vae(tmp_path / "vae", **options)
    stage, theirs = FirstStageSource(vae).opened(), Theirs.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    ours = AutoencoderKL(**stage.params).eval()
    ours.load_state_dict(stage.tensors)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    z = ours.encode(x)
    assert stage.scale_factor == 0.5 and z.shape == (2, 3, 8, 8) and z.std() > 1e-3
    torch.testing.assert_close(z, theirs.encode(x).latent_dist.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"), [("shift_factor", "0.1"), ("latents_mean", "[0.0, 0.1, 0.0]"), ("latents_std", "[2.0, 2.0, 2.0]")]
)
def test_a_first_stage_option_that_we_do_not_have_is_refused(key: str, value: str, vae: Path) -> None:
    config = vae / "config.json"
    config.write_text(config.read_text().replace(f'"{key}": null', f'"{key}": {value}'))
    with pytest.raises(UserError, match=rf"{key} {re.escape(value)} is not supported"):
        FirstStageSource(vae).opened()


def test_a_compvis_file_with_a_kl_first_stage_needs_no_description_of_it(tmp_path: Path) -> None:
    kl = randomised(AutoencoderKL(**KL_PARAMS))
    unet = randomised(UNet(**UNET_PARAMS))
    file = write_compvis_checkpoint(tmp_path / "model.ckpt", unet, kl, schedule_of(DIFFUSION))
    model = open_teacher(run_with(file, params=GIVEN))
    codec = model.codec()
    assert codec.target == "ldm_dkdm.first_stage.AutoencoderKL" and codec.params["ddconfig"]["double_z"]
    assert all(map(torch.equal, codec.autoencoder.state_dict().values(), kl.state_dict().values()))
    assert codec.decode(torch.randn(2, 3, 8, 8)).shape == (2, 32, 32, 3)


def test_a_student_on_kl_latents_leaves_for_diffusers_and_compvis_and_comes_back(tmp_path: Path) -> None:
    vae = write_vae(tmp_path / "vae", attends=True)
    teacher = model_folder(tmp_path / "teacher", vae)
    student = {"parameterization": "eps"}
    assert distil("--base", write_yaml(tmp_path / "run.yaml", distill_config(teacher, tmp_path, student=student))) == 0
    run = tmp_path / "run"
    weights = load_file(run / "student" / "student.safetensors")
    for layout, out in (("diffusers", tmp_path / "pipeline"), ("compvis", tmp_path / "model.ckpt")):
        assert run_script("convert.py", run, out, "--to", layout) == 0  # diffusers samples the same, or it is an error
        model = open_teacher(run_with(out, params=GIVEN if layout == "compvis" else {}))
        assert all(torch.equal(model.network.state_dict()[name], value) for name, value in weights.items())
        codec = model.codec()
        own = FirstStageSource(vae).opened().tensors
        assert codec.scale_factor == 0.5
        assert all(torch.equal(codec.autoencoder.state_dict()[name], value) for name, value in own.items())
    assert "ldm.models.autoencoder.AutoencoderKL" in (tmp_path / "model.yaml").read_text()
    assert "first_stage_model.quant_conv.weight" in read_tensors(tmp_path / "model.ckpt")


def test_a_public_dit_of_latents_teaches_with_its_variance_or_without(vae: Path, tmp_path: Path) -> None:
    dit = randomised(DiT(**DIT, num_classes=4))
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    schedule = {
        "schedule": "linear",
        "num_timesteps": 20,
        "beta_end": 0.4,
    }  # random weights magnify x_0 where abar is 0
    config = distill_config(tmp_path / "dit.pt", tmp_path, diffusion=schedule)
    config["teacher"]["params"] = {"num_heads": 2, "num_classes": 4, "class_dropout_prob": 0.1}
    config["first_stage"] = {"ckpt": str(vae)}
    for name, params, channels in (("both", {**DIT, "num_classes": 4}, 6), ("eps", {**DIT, "learn_sigma": False}, 3)):
        config["student"] = {"target": "ldm_dkdm.networks.DiT", "params": params}
        config["logging"]["name"] = name
        assert distil("--base", write_yaml(tmp_path / f"{name}.yaml", config)) == 0
        metrics = (tmp_path / name / "metrics.csv").read_text().splitlines()[0]
        assert ("vlb" in metrics) == (channels == 6)
        out = tmp_path / "samples" / name
        assert sample("-r", tmp_path / name, "-n", 2, "-c", 4, "--sampler", "ddpm", "--npz", "-l", out) == 0
        assert np.load(out / "samples.npz")["arr_0"].shape == (2, 32, 32, 3)


def test_double_z_says_whether_there_is_a_codebook() -> None:
    with pytest.raises(UserError, match="ddconfig: a KL first stage has double_z: true"):
        AutoencoderKL(DDCONFIG, 3)
    with pytest.raises(UserError, match="ddconfig: a VQ first stage has double_z: false"):
        VQModel(KL_PARAMS["ddconfig"], 64, 3)
