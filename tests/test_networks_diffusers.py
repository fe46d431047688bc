"""The UNet's outputs against diffusers' UNet2DModel, weight for weight."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ldm_dkdm.networks import UNet
from ldm_dkdm.networks.layers import AttentionBlock, Downsample, ResBlock, Upsample
from tests.parts import UNET_PARAMS, randomised


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.weight.copy_(ours.weight.view_as(theirs.weight))
    theirs.bias.copy_(ours.bias)


def _copy_resblock(ours: ResBlock, theirs: nn.Module) -> None:
    _copy(ours.in_layers[0], theirs.norm1)
    _copy(ours.in_layers[2], theirs.conv1)
    _copy(ours.emb_layers[1], theirs.time_emb_proj)
    _copy(ours.out_layers[0], theirs.norm2)
    _copy(ours.out_layers[3], theirs.conv2)
    assert (theirs.conv_shortcut is None) == isinstance(ours.skip_connection, nn.Identity)
    if theirs.conv_shortcut is not None:
        _copy(ours.skip_connection, theirs.conv_shortcut)


def _copy_attention(ours: AttentionBlock, theirs: nn.Module) -> None:
    _copy(ours.norm, theirs.group_norm)
    _copy(ours.proj_out, theirs.to_out[0])
    layout = (3, ours.heads, -1) if ours.new_order else (ours.heads, 3, -1)
    weight = ours.qkv.weight.squeeze(-1).unflatten(0, layout).movedim(0 if ours.new_order else 1, 0).flatten(1, 2)
    bias = ours.qkv.bias.unflatten(0, layout).movedim(0 if ours.new_order else 1, 0).flatten(1, 2)
    for i, linear in enumerate((theirs.to_q, theirs.to_k, theirs.to_v)):
        linear.weight.copy_(weight[i])
        linear.bias.copy_(bias[i])


def _copy_sampler(ours: nn.Module, theirs: nn.Module) -> None:
    if isinstance(ours, ResBlock):
        _copy_resblock(ours, theirs)
    else:
        _copy(ours.op if isinstance(ours, Downsample) else ours.conv, theirs.conv)


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, AttentionBlock):
        return "attention"
    resamples = isinstance(layer, Downsample | Upsample) or not isinstance(layer.resample, nn.Identity)
    return "sampler" if resamples else "resblock"


@torch.no_grad()
def _copy_unet(ours: UNet, theirs: UNet2DModel) -> None:
    """Our weights under diffusers' names; both sides list their layers in the order in which they run."""
    _copy(ours.time_embed[0], theirs.time_embedding.linear_1)
    _copy(ours.time_embed[2], theirs.time_embedding.linear_2)
    _copy(ours.input_blocks[0][0], theirs.conv_in)
    _copy(ours.out[0], theirs.conv_norm_out)
    _copy(ours.out[2], theirs.conv_out)
    layers = [layer for block in ours.input_blocks[1:] for layer in block]
    layers += [*ours.middle_block, *(layer for block in ours.output_blocks for layer in block)]
    blocks = [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]
    names = {"resblock": ("resnets",), "attention": ("attentions",), "sampler": ("downsamplers", "upsamplers")}
    copies = {"resblock": _copy_resblock, "attention": _copy_attention, "sampler": _copy_sampler}
    for kind, attributes in names.items():
        own = [layer for layer in layers if _kind(layer) == kind]
        found = [layer for block in blocks for name in attributes for layer in getattr(block, name, None) or []]
        for pair in zip(own, found, strict=True):
            copies[kind](*pair)


ADM = {
    "out_channels": 6,
    "attention_resolutions": [1, 2],
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
LDM_STYLE = (
    {**UNET_PARAMS, "num_res_blocks": 2, "channel_mult": [1, 2, 4], "attention_resolutions": [2, 4]},
    {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 128),
        "layers_per_block": 2,
    },
)
ADM_STYLE = (
    {**UNET_PARAMS, **ADM},
    {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 32,
        "out_channels": 6,
    },
)


@pytest.mark.parametrize(("params", "theirs"), [LDM_STYLE, ADM_STYLE], ids=["ldm", "adm"])
def test_outputs_equal_diffusers(params: dict[str, object], theirs: dict[str, object]) -> None:
    ours = randomised(UNet(**params)).eval()
    other = UNet2DModel(sample_size=8, attention_head_dim=32, freq_shift=0, flip_sin_to_cos=True, **theirs).eval()
    _copy_unet(ours, other)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 977])
    with torch.no_grad():
        output = ours(x, t)
        torch.testing.assert_close(output, other(x, t).sample, rtol=1e-4, atol=1e-4 * output.abs().max().item())
