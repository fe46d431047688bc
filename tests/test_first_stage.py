"""The first stage: what encode and decode mean, and equality with diffusers' VQModel."""

import re
from pathlib import Path

import diffusers
import pytest
import torch

from ldm_dkdm.evaluation.perceptual import lpips_loss
from ldm_dkdm.first_stage import VQModel, codec
from ldm_dkdm.first_stage.codec import LatentCodec
from tests.parts import DDCONFIG, VQ_PARAMS, randomised

RENAMES = [
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.", r"\1.mid_block.attentions.0.group_norm."),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.", r"\1.mid_block.attentions.0.to_out.0."),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.", r"\1.mid_block.attentions.0.to_\2."),
    (r"encoder\.down\.(\d)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"encoder\.down\.(\d)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"decoder\.up\.(\d)\.block\.", lambda m: f"decoder.up_blocks.{2 - int(m[1])}.resnets."),
    (r"decoder\.up\.(\d)\.upsample\.", lambda m: f"decoder.up_blocks.{2 - int(m[1])}.upsamplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
]


@pytest.fixture
def vq() -> VQModel:
    return randomised(VQModel(**VQ_PARAMS)).eval()


def as_diffusers(vq: VQModel) -> diffusers.VQModel:
    """The same weights in the independent implementation."""
    other = diffusers.VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[DDCONFIG["ch"] * mult for mult in DDCONFIG["ch_mult"]],
        layers_per_block=DDCONFIG["num_res_blocks"],
        latent_channels=3,
        num_vq_embeddings=VQ_PARAMS["n_embed"],
        scaling_factor=1.0,
    )
    state = {}
    for own_name, tensor in vq.state_dict().items():
        name = own_name
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor[..., 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
    other.load_state_dict(state)
    return other.eval()


@torch.no_grad()
def test_latents_and_images_equal_diffusers(vq: VQModel) -> None:
    other, x = as_diffusers(vq), torch.rand(2, 3, 32, 32) * 2 - 1
    z = vq.encode(x)
    torch.testing.assert_close(z, other.encode(x).latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vq.decode(z), other.decode(z).sample, rtol=1e-4, atol=1e-4)
    unquantised = other.decode(z, force_not_quantize=True).sample
    torch.testing.assert_close(vq.decode(z, force_not_quantize=True), unquantised, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_encode_does_not_quantise_and_decode_does(vq: VQModel) -> None:
    z, codes = vq.encode(torch.rand(1, 3, 32, 32)), vq.quantize.embedding.weight
    vectors = z.movedim(1, -1).reshape(-1, 3)
    nearest = codes[torch.cdist(vectors, codes).argmin(1)]
    assert (nearest - vectors).abs().max() > 1e-3
    quantised = nearest.view(1, 8, 8, 3).movedim(-1, 1)
    torch.testing.assert_close(vq.decode(z), vq.decode(quantised, force_not_quantize=True))
    assert not torch.equal(vq.decode(z), vq.decode(z, force_not_quantize=True))


def test_the_state_dict_has_compvis_names(vq: VQModel) -> None:
    names = set(vq.state_dict())
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"}
    assert {"quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias"} <= names


def test_full_size_has_the_releases_parameters() -> None:
    ddconfig = {**DDCONFIG, "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2, "resolution": 256}
    with torch.device("meta"):
        full = VQModel(ddconfig, n_embed=8192, embed_dim=3)
    count = sum(p.numel() for p in full.parameters())
    assert round(count / 1e6, 1) == 55.3


@torch.no_grad()
def test_a_codec_scales_and_decodes_in_parts(vq: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    whole = LatentCodec(vq, scale_factor=0.5)
    latents = whole.encode(images)
    torch.testing.assert_close(latents, 0.5 * vq.encode(images.movedim(-1, 1) / 127.5 - 1))
    decoded = whole.decode(latents)
    monkeypatch.setattr(codec, "MAX_DISTANCES", 2 * 64 * 64)  # two images of 64 positions and 64 codes
    sizes: list[int] = []
    inner = vq.decode
    monkeypatch.setattr(vq, "decode", lambda z: (sizes.append(len(z)), inner(z))[1])
    assert (whole.decode(latents).int() - decoded.int()).abs().max() <= 1
    assert sizes == [2, 2, 1]


def test_lpips_loads_local_weights_and_measures_a_distance(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    features = {f"features.{k}": v for k, v in vgg16(init_weights=False).features.state_dict().items()}
    file = tmp_path / "vgg16.pth"
    torch.save(features, file)
    metric, x = lpips_loss(str(file)), torch.rand(1, 3, 32, 32) * 2 - 1
    third = dict(metric.net.slice3.named_children())
    assert torch.equal(third["10"].weight, features["features.10.weight"])
    assert metric(x, x).item() == pytest.approx(0, abs=1e-6)
    assert metric(x, -x).item() > 1e-4
