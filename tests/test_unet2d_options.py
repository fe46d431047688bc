"""Options of diffusers' UNet2DModel that change what its layers are, against the library itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ldm_dkdm import UserError, load_model
from tests.parts import randomised
from tests.test_diffusers_format import BASE, outputs

GOOGLE = {
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}  # options of google/ddpm-cifar10-32 and its family
NARROW = {"block_out_channels": (16, 32), "norm_num_groups": 8}
SCALES = {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}
BARE = {"add_attention": False}


def saved(folder: Path, **options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    network = randomised(UNet2DModel(**{**BASE, **options}))
    DDPMPipeline(network, DDPMScheduler(40)).save_pretrained(folder)
    return network


@pytest.mark.parametrize(
    "options",
    [*({key: value} for key, value in GOOGLE.items()), GOOGLE, NARROW, NARROW | SCALES, BARE, NARROW | BARE],
)
def test_layers_are_the_library_s_and_survive_every_format_that_has_them(
    options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved(tmp_path / "in", **options)
    model = load_model(tmp_path / "in")
    assert outputs(model.network, theirs, None) < 1e-4
    model.save(tmp_path / "out", "diffusers")
    back = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert outputs(model.network, back, None) < 1e-4
    model.save(tmp_path / "folder")
    assert outputs(load_model(tmp_path / "folder").network, theirs, None) < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (GOOGLE, "guided-diffusion has no freq_shift, cosines_first, downsample_padding, norm_eps; choose"),
        (NARROW, "guided-diffusion has no norm_groups; choose diffusers or safetensors"),
        (BARE, "guided-diffusion has attention in every middle block; choose diffusers or safetensors"),
        ({"mid_block_type": None}, "guided-diffusion has no UNet without a middle block; choose diffusers"),
    ],
)
def test_formats_without_these_options_refuse_them(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved(tmp_path / "in", **options)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "in").save(tmp_path / "out.pt", "adm")
    assert not (tmp_path / "out.pt").exists()


def test_a_middle_attention_with_a_norm_of_its_own_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "in", attn_norm_num_groups=16)
    with pytest.raises(UserError, match="attn_norm_num_groups: 16 is not supported, only None or 32"):
        load_model(tmp_path / "in")
