"""The UNet: its size, its names, its attention, what it refuses."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_dkdm import UserError
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.networks.layers import SMALL_CPU_ATTENTION, AttentionBlock, attend
from tests.parts import LDM, UNET_PARAMS, randomised

ADM = {
    "in_channels": 3,
    "out_channels": 6,
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
ADM32 = {**ADM, "image_size": 32, "attention_resolutions": [2, 4], "channel_mult": [1, 2, 2, 2]}
ADM64 = {**ADM, "image_size": 64, "attention_resolutions": [2, 4, 8], "channel_mult": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("count", "params"),
    [
        (274_056_163, {**LDM, "model_channels": 224}),
        (89_535_619, {**LDM, "model_channels": 128}),
        (57_094_662, {**ADM32, "model_channels": 128, "num_res_blocks": 3}),
        (44_177_286, {**ADM32, "model_channels": 128, "num_res_blocks": 2}),
        (32_136_582, {**ADM32, "model_channels": 96, "num_res_blocks": 3}),
        (24_866_214, {**ADM32, "model_channels": 96, "num_res_blocks": 2}),
        (14_301_446, {**ADM32, "model_channels": 64, "num_res_blocks": 3}),
        (295_136_454, {**ADM64, "model_channels": 192, "num_res_blocks": 3, "num_head_channels": 64}),
        (57_213_606, {**ADM64, "model_channels": 96, "num_res_blocks": 2}),
    ],
)
def test_parameter_count_is_the_reference_implementations(count: int, params: dict[str, object]) -> None:
    with torch.device("meta"):
        network = UNet(**params)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def _keys(**params: object) -> set[str]:
    with torch.device("meta"):
        return set(UNet(**params).state_dict())


COMPVIS_KEYS = re.compile(
    r"(time_embed\.[02]|input_blocks\.0\.0|out\.[02]"
    r"|(input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d\."
    r"(in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection|norm|qkv|proj_out|op|conv))\.(weight|bias)"
)


def test_keys_are_those_of_compvis() -> None:
    keys = _keys(**LDM, model_channels=224)
    assert [key for key in keys if not COMPVIS_KEYS.fullmatch(key)] == []
    samplers = {key for key in keys if re.search(r"\.(op|conv)\.weight", key)}
    downs, ups = [f"input_blocks.{i}.0.op.weight" for i in (3, 6, 9)], [(2, 2), (5, 2), (8, 2)]
    assert samplers == {*downs, *(f"output_blocks.{i}.{j}.conv.weight" for i, j in ups)}
    attentions = {key.removesuffix(".qkv.weight") for key in keys if key.endswith(".qkv.weight")}
    inputs, outputs = (4, 5, 7, 8, 10, 11), range(9)
    assert attentions == {f"input_blocks.{i}.1" for i in inputs} | {"middle_block.1"} | {
        f"output_blocks.{i}.1" for i in outputs
    }


def test_an_upsampler_without_attention_is_the_second_layer() -> None:
    assert "output_blocks.2.1.conv.weight" in _keys(**{**LDM, "attention_resolutions": []}, model_channels=32)


def test_blocks_that_resample_have_no_op_and_no_conv() -> None:
    keys = _keys(**ADM32, model_channels=64, num_res_blocks=3)
    assert not [key for key in keys if ".op." in key or ".conv." in key]


def _qkv(tokens: int) -> list[Tensor]:
    return [torch.randn(2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("tokens", [5, SMALL_CPU_ATTENTION, SMALL_CPU_ATTENTION + 1])
def test_attention_equals_pytorchs_in_value_and_gradient(tokens: int) -> None:
    qkv = _qkv(tokens)
    ours, theirs = attend(*qkv), F.scaled_dot_product_attention(*qkv)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    towards = torch.randn_like(ours)
    for own, other in zip(torch.autograd.grad(ours, qkv, towards), torch.autograd.grad(theirs, qkv, towards)):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_attention_orders_differ_by_a_permutation_of_rows() -> None:
    old, new = randomised(AttentionBlock(64, 2)), AttentionBlock(64, 2, new_order=True)
    new.load_state_dict(old.state_dict())
    x = torch.randn(2, 64, 4, 4)
    assert not torch.allclose(old(x), new(x), atol=1e-3)
    rows = torch.arange(3 * 64).view(2, 3, 32).transpose(0, 1).flatten()
    with torch.no_grad():
        new.qkv.weight.copy_(old.qkv.weight[rows])
        new.qkv.bias.copy_(old.qkv.bias[rows])
    torch.testing.assert_close(old(x), new(x))


def test_use_checkpoint_changes_neither_output_nor_gradients() -> None:
    results = []
    for use_checkpoint in (False, True):
        network = randomised(UNet(**UNET_PARAMS, use_checkpoint=use_checkpoint))
        x = torch.linspace(-1, 1, 192).view(1, 3, 8, 8).requires_grad_()
        output = network(x, torch.tensor([7]))
        gradients = torch.autograd.grad(output.square().mean(), [x, *network.parameters()])
        results.append((output, *gradients))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("key", "params"),
    [
        ("model_channels", {"model_channels": 24}),
        ("num_head_channels", {"num_head_channels": 48}),
        ("num_head", {"num_head_channels": -1, "num_heads": 5}),
    ],
)
def test_widths_that_do_not_divide_are_refused(key: str, params: dict[str, object]) -> None:
    with pytest.raises(UserError, match=key):
        UNet(**{**UNET_PARAMS, **params})


def _replica(network: nn.Module) -> nn.Module:
    """What DataParallel calls on each GPU: modules whose weights are plain attributes, not parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, copy in copies.items():
        for name, child in module.named_children():
            setattr(copy, name, copies[child])
        for name, weight in module._parameters.items():
            setattr(copy, name, None if weight is None else weight.detach())
    return copies[network]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["UNet", "DiT"])
def test_a_replica_and_a_compiled_embedding_give_the_same(kind: str, dtype: torch.dtype) -> None:
    network = UNet(**UNET_PARAMS) if kind == "UNet" else DiT(8, in_channels=3, hidden_size=32, depth=1, num_heads=2)
    network = randomised(network).to(dtype).eval()
    x, t = torch.linspace(-1, 1, 192, dtype=dtype).view(1, 3, 8, 8), torch.tensor([7])
    with torch.no_grad():
        want = network(x, t)
        assert torch.equal(_replica(network)(x, t), want)
        for name in ("time_embed", "t_embedder"):
            if hasattr(network, name):
                setattr(network, name, torch.compile(getattr(network, name), backend="eager"))
        assert torch.equal(network(x, t), want)
