"""UNets of guided-diffusion with fractional widths, odd heads or pooling: inferred, built and narrowed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints.first_stages import infer_first_stage
from ldm_dkdm.config.registry import build
from ldm_dkdm.first_stage import FIRST_STAGES, VQModel
from ldm_dkdm.networks import UNet
from ldm_dkdm.networks.scaling import unet_within_budget
from ldm_dkdm.networks.unet import level_widths
from tests.cli import sample
from tests.parts import DDCONFIG, UNET_PARAMS, VQ_PARAMS, randomised

HINTS: dict[str, Any] = {"use_new_attention_order": False, "schedule": "cosine", "space": "pixel"}
HALF = {"model_channels": 64, "channel_mult": [1, 1.5, 2]}
ADM_512 = {"model_channels": 64, "channel_mult": [0.5, 1, 1, 2], "attention_resolutions": [2, 8]}
POOLING = {"conv_resample": False, "channel_mult": [1, 2, 2], "num_res_blocks": 2}
NO_MIDDLE = {"middle_block": False}
UNUSUAL = [HALF, ADM_512, POOLING, {"conv_resample": False}, {**POOLING, "attention_resolutions": []}, NO_MIDDLE]


def saved(unet: UNet, path: Path) -> Path:
    torch.save(unet.state_dict(), path)
    return path


@pytest.mark.parametrize("change", UNUSUAL)
def test_the_file_is_the_network(change: dict[str, Any], tmp_path: Path) -> None:
    params = {**UNET_PARAMS, **change}
    unet = randomised(UNet(**params))
    given = {key: params[key] for key in ("image_size", "num_head_channels", "middle_block") if key in params}
    model = load_model(saved(unet, tmp_path / "x.pt"), **given, **HINTS)
    assert model.node.params["channel_mult"] == params["channel_mult"]
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    with torch.no_grad():
        assert torch.equal(model.network(x, t), unet.eval()(x, t))


def test_widths_are_cut_to_whole_channels_as_in_guided_diffusion() -> None:
    assert level_widths(256, [0.5, 1, 1, 2, 2, 4, 4]) == [128, 256, 256, 512, 512, 1024, 1024]
    assert level_widths(100, [0.29, 0.64, 2]) == [29, 64, 200]
    assert level_widths(192, [0.67]) == [128]


def test_heads_matter_only_where_there_is_attention(tmp_path: Path) -> None:
    params = {**UNET_PARAMS, "model_channels": 96, "num_head_channels": 64}
    model = load_model(saved(UNet(**params), tmp_path / "x.pt"), image_size=8, num_head_channels=64, **HINTS)
    assert model.network.input_blocks[3][1].heads == 3
    for wrong in ({"attention_resolutions": [1]}, {"channel_mult": [1, 1], "attention_resolutions": []}):
        with pytest.raises(UserError, match=r"num_head_channels: 96 channels of level \d do not divide"):
            UNet(**{**params, **wrong})
    with pytest.raises(UserError, match="num_heads: 64 channels of level 1 do not divide"):
        UNet(**{**UNET_PARAMS, "num_head_channels": -1, "num_heads": 3})


def test_without_a_middle_block_heads_matter_only_at_the_levels_with_attention() -> None:
    params = {**UNET_PARAMS, "model_channels": 96, "channel_mult": [1, 1], "attention_resolutions": []}
    params |= {"num_head_channels": 64, "middle_block": False}
    assert not any("qkv" in name for name in UNet(**params).state_dict())
    assert unet_within_budget(params, 10**9)["model_channels"] == 96
    assert unet_within_budget({**params, "middle_block": True}, 10**9)["model_channels"] == 64


def test_a_width_that_no_norm_group_divides_is_refused() -> None:
    with pytest.raises(UserError, match="channel_mult gives level 1 80 channels"):
        UNet(**{**UNET_PARAMS, "model_channels": 64, "channel_mult": [1, 1.25]})
    with pytest.raises(UserError, match=r"channel_mult\[1\]: expected a number, got 'x'"):
        build(
            {"target": "ldm_dkdm.networks.UNet", "params": {**UNET_PARAMS, "channel_mult": [1, "x"]}},
            {"ldm_dkdm.networks.UNet": UNet},
        )


@pytest.mark.parametrize("change", [HALF, ADM_512, {"model_channels": 192, "num_head_channels": 64}])
def test_narrowed_copies_keep_whole_groups_and_heads(change: dict[str, Any]) -> None:
    params = {**UNET_PARAMS, **change}
    full = UNet(**params)
    size = sum(parameter.numel() for parameter in full.parameters())
    assert unet_within_budget(params, size)["model_channels"] == params["model_channels"]
    narrow = unet_within_budget({**params, "model_channels": 4 * params["model_channels"]}, size)
    assert narrow["model_channels"] >= params["model_channels"]
    UNet(**narrow)


@pytest.mark.parametrize("lost", ["input_blocks.1.", "input_blocks.4.", "input_blocks.8."])
def test_a_pooling_unet_that_lacks_a_block_is_incomplete(lost: str, tmp_path: Path) -> None:
    tensors = {k: v for k, v in UNet(**{**UNET_PARAMS, **POOLING}).state_dict().items() if not k.startswith(lost)}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"incomplete|do not divide"):
        load_model(tmp_path / "x.pt", image_size=8, num_head_channels=32, **HINTS)


def test_a_first_stage_that_pools_is_inferred() -> None:
    dd = {**DDCONFIG, "resamp_with_conv": False}
    tensors = VQModel(**{**VQ_PARAMS, "ddconfig": dd}).state_dict()
    target, params = infer_first_stage(tensors, 8, Path("x.ckpt"))
    assert params["ddconfig"] == dd
    build({"target": target, "params": params}, FIRST_STAGES).load_state_dict(tensors)


def test_a_first_stage_with_fractional_widths_is_refused_by_its_widths() -> None:
    tensors = dict(VQModel(**VQ_PARAMS).state_dict())
    tensors["encoder.down.2.block.0.conv1.weight"] = torch.zeros(48, 32, 3, 3)
    with pytest.raises(UserError, match=r"channels \[32, 32, 48\] are not multiples"):
        infer_first_stage(tensors, 8, Path("x.ckpt"))


@pytest.mark.parametrize(
    "hint",
    ["channel_mult=1,2", "attention_resolutions=2", "num_heads_upsample=-1", "channel_mult=", "attention_resolutions="],
)
def test_values_in_guided_diffusions_spelling_are_taken(hint: str, tmp_path: Path) -> None:
    file = saved(UNet(**UNET_PARAMS), tmp_path / "x.pt")
    hints = ["image_size=8", "num_head_channels=32", "use_new_attention_order=false", "schedule=cosine", "space=pixel"]
    assert sample("-r", file, "-n", 1, "-c", 1, "-l", tmp_path / "out", *hints, hint) == 0


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        ("attention_resolutions=4,8", "attention_resolutions: [4, 8], but the tensors of "),
        ("attention_resolutions=4,8", "say [2]; here they are downsampling factors, not sides of images"),
        ("num_heads_upsample=4", "num_heads_upsample: is not a hint; only its default -1 works"),
        ("xstart=true", "xstart: is not a hint; write parameterization=x0 (for true)"),
        ("channel_mlt=", "channel_mlt: has no value, and is not the name of a hint"),
        ("num_head_channels=0", "params.num_head_channels: 0 is not at least 1, nor -1 (num_heads decides)"),
    ],
)
def test_other_values_are_refused_by_their_key(
    hint: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(UNet(**UNET_PARAMS), tmp_path / "x.pt")
    hints = ["image_size=8", "num_head_channels=32", "use_new_attention_order=false", "schedule=cosine", "space=pixel"]
    assert sample("-r", file, "-n", 1, "-c", 1, "-l", tmp_path / "out", *hints, hint) == 2
    assert words in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
