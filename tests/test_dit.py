"""The diffusion transformer: against diffusers', and its size, names, start, label dropout and refusals."""

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.config.registry import build
from ldm_dkdm.networks import NETWORKS, DiT
from ldm_dkdm.networks.dit import grid_positions
from tests.cli import run_script
from tests.parts import randomised

PARAMS = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 4}
LABELLED = {**PARAMS, "num_classes": 5}
TAB_10 = {"input_size": 32, "patch_size": 2, "in_channels": 3, "hidden_size": 384, "depth": 7, "num_heads": 6}


def _random(**params: object) -> DiT:
    """Random trained weights, also where the network starts at zero; the fixed positions stay."""
    network = DiT(**params)
    positions = network.pos_embed.clone()
    randomised(network)
    network.pos_embed.data.copy_(positions)
    return network.eval()


def _states(batch: int, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("classes", "trained", "table"), [(None, 19_176_216, 0), (1000, 19_560_600, 1001 * 384)])
def test_parameter_counts_are_the_papers(classes: int | None, trained: int, table: int) -> None:
    """19.27 and 19.66 million (Tab. 10) count the fixed positions; the trained weights are 98,304 fewer."""
    with torch.device("meta"):
        network = DiT(**TAB_10, num_classes=classes)
    counts = {name: parameter.numel() for name, parameter in network.named_parameters()}
    assert sum(counts.values()) == 19_274_520 + table
    assert round(sum(counts.values()) / 1e6, 2) == (19.66 if table else 19.27)
    assert counts["pos_embed"] == 98_304
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trained


def test_names_are_those_of_the_public_code() -> None:
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    layers = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += [f"blocks.{i}.{name}" for i in range(2) for name in inside]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"pos_embed"}
    assert set(DiT(**PARAMS).state_dict()) == names
    assert set(DiT(**LABELLED).state_dict()) == names | {"y_embedder.embedding_table.weight"}


def _copy(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.weight.copy_(ours.weight)
    theirs.bias.copy_(ours.bias)


@torch.no_grad()
def _copy_dit(ours: DiT, theirs: DiTTransformer2DModel) -> None:
    """Our weights under diffusers' names; it keeps a copy of the embedders in every block, and its own positions."""
    _copy(ours.x_embedder.proj, theirs.pos_embed.proj)
    _copy(ours.final_layer.adaLN_modulation[1], theirs.proj_out_1)
    _copy(ours.final_layer.linear, theirs.proj_out_2)
    for own, other in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        embedders = other.norm1.emb
        embedders.time_proj.downscale_freq_shift = 0  # diffusers' 1 is not what DiT was trained with
        _copy(ours.t_embedder.mlp[0], embedders.timestep_embedder.linear_1)
        _copy(ours.t_embedder.mlp[2], embedders.timestep_embedder.linear_2)
        table = embedders.class_embedder.embedding_table.weight
        table.copy_(torch.zeros_like(table) if ours.num_classes is None else ours.y_embedder.embedding_table.weight)
        _copy(own.adaLN_modulation[1], other.norm1.linear)
        for i, linear in enumerate((other.attn1.to_q, other.attn1.to_k, other.attn1.to_v)):
            linear.weight.copy_(own.attn.qkv.weight.chunk(3)[i])
            linear.bias.copy_(own.attn.qkv.bias.chunk(3)[i])
        _copy(own.attn.proj, other.attn1.to_out[0])
        _copy(own.mlp.fc1, other.ff.net[0].proj)
        _copy(own.mlp.fc2, other.ff.net[2])


def _diffusers(network: DiT) -> DiTTransformer2DModel:
    heads = network.blocks[0].attn.heads
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=network.pos_embed.shape[-1] // heads,
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        num_layers=len(network.blocks),
        sample_size=network.image_size,
        patch_size=network.patch_size,
        num_embeds_ada_norm=network.num_classes or 5,
        norm_eps=1e-6,
    )
    _copy_dit(network, theirs)
    return theirs.double().eval()


@pytest.mark.parametrize(
    "params",
    [LABELLED, PARAMS, {**LABELLED, "input_size": 12, "patch_size": 4, "learn_sigma": False}],
    ids=["labels", "unconditional", "patch 4, no sigma"],
)
def test_outputs_and_gradients_equal_diffusers(params: dict[str, int]) -> None:
    ours = _random(**params)
    theirs = _diffusers(ours)
    ours.double()
    x = _states(3, params["input_size"], torch.float64).requires_grad_()
    t, label = torch.tensor([0, 3, 977]), torch.tensor([0, 5, 2])  # 5: the null label
    outputs = [ours(x, t, label), theirs(x, t, class_labels=label).sample]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    towards = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, x, towards)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # another path through attention
        torch.testing.assert_close(ours(x, t, label), outputs[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("side", "width"), [(4, 32), (7, 12), (16, 384)])
def test_positions_equal_diffusers(side: int, width: int) -> None:
    theirs = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
    torch.testing.assert_close(grid_positions(side, width), theirs, rtol=0, atol=1e-12)
    network = DiT(**{**PARAMS, "input_size": 2 * side, "hidden_size": width})
    torch.testing.assert_close(network.pos_embed[0], theirs.float(), rtol=0, atol=1e-7)


def test_the_start_is_adaln_zero() -> None:
    """Every block is the identity and the output is zero, whatever the state and the timestep."""
    network = DiT(**PARAMS)
    tokens, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in network.blocks:
        assert torch.equal(block(tokens, condition), tokens)
    assert torch.equal(network(_states(2), torch.tensor([1, 500])), torch.zeros(2, 6, 8, 8))


def test_weights_start_as_published() -> None:
    weights = dict(DiT(**{**PARAMS, "hidden_size": 64, "num_classes": 200}).named_parameters())
    for name, weight in weights.items():
        if name.endswith("bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not weight.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert abs(weight.std().item() / 0.02 - 1) < 0.1, name
        elif name != "pos_embed":
            fans = weight.flatten(1).shape  # a patch counts as the input of a linear layer
            bound = math.sqrt(6 / sum(fans))
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert abs(weight.std().item() * math.sqrt(3) / bound - 1) < 0.1, name


def test_an_unconditional_network_depends_on_each_samples_own_timestep() -> None:
    network, x = _random(**PARAMS), _states(1)
    with torch.no_grad():
        early, late = (network(x, torch.tensor([t])) for t in (1, 500))
        both = network(x.expand(2, -1, -1, -1), torch.tensor([1, 500]))
    assert (early - late).abs().mean() > 0.05 * early.abs().mean()
    torch.testing.assert_close(both, torch.cat([early, late]))


def test_label_dropout_acts_in_training_only() -> None:
    network, x, t = _random(**LABELLED, class_dropout_prob=1.0), _states(2), torch.tensor([3, 9])
    label = torch.tensor([0, 4])
    with torch.no_grad():
        given, null = network(x, t, label), network(x, t, torch.full((2,), network.null_label))
        assert (given - null).abs().amax(dim=(1, 2, 3)).min() > 1e-3
        assert torch.equal(network.train()(x, t, label), null)
        assert torch.equal(network.eval()(x, t, label), given)


def test_label_dropout_has_the_probability_asked_for_and_the_global_generator() -> None:
    embedder = _random(**LABELLED, class_dropout_prob=0.25).y_embedder.train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(embedder.dropped(torch.full((4000,), 2)))
    dropped = draws[0] == 5
    assert torch.equal(dropped, draws[0] != 2)
    assert abs(dropped.float().mean().item() - 0.25) < 0.03  # 4 standard deviations
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_label_is_dropped_for_all_blocks_or_for_none() -> None:
    network = _random(**LABELLED, class_dropout_prob=0.5, own_embedders=True)
    x, t, two = torch.randn(1, 3, 8, 8).expand(40, -1, -1, -1), torch.full((40,), 3), torch.full((40,), 2)
    with torch.no_grad():
        given, null = network.eval()(x, t, two), network(x, t, two + network.null_label - 2)
        seen = network.train()(x, t, two)
    as_given, as_null = ((seen - one).abs().amax(dim=(1, 2, 3)) < 1e-6 for one in (given, null))
    assert torch.equal(as_given, ~as_null) and 8 < int(as_null.sum()) < 32


def test_without_label_dropout_there_is_no_null_label() -> None:
    network = _random(**LABELLED, class_dropout_prob=0.0)
    assert network.null_label is None
    assert (DiT(**LABELLED).null_label, DiT(**PARAMS).null_label) == (5, None)
    label = torch.arange(5)
    assert network.train().y_embedder.dropped(label) is label
    assert torch.equal(network.y_embedder(label), network.y_embedder.embedding_table.weight)
    with pytest.raises(IndexError):
        network.y_embedder(torch.tensor([5]))


def test_use_checkpoint_recomputes_the_blocks_and_changes_no_gradient() -> None:
    results, runs = [], []
    for use_checkpoint in (False, True):
        network = _random(**LABELLED, use_checkpoint=use_checkpoint)
        network.blocks[1].register_forward_pre_hook(lambda *_, flag=use_checkpoint: runs.append(flag))
        x = _states(2).requires_grad_()
        output = network(x, torch.tensor([7, 20]), torch.tensor([1, 2]))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        results.append((output, *torch.autograd.grad(output.square().mean(), [x, *trained])))
    assert runs == [False, True, True]
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bfloat16_autocast_stays_near_float32() -> None:
    network = _random(**LABELLED)
    args = _states(4), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 5])
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = network(*args)
        gradients = torch.autograd.grad(output.float().square().mean(), trained)
        results.append((output, torch.cat([gradient.flatten() for gradient in gradients])))
    assert results[1][0].dtype == torch.bfloat16
    for full, half in zip(*results, strict=True):
        assert 0 < (half.float() - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize(
    ("key", "params"),
    [
        ("patch_size", {"patch_size": 3}),
        ("patch_size", {"patch_size": 0}),
        ("input_size", {"input_size": 0}),
        ("in_channels", {"in_channels": -3}),
        ("depth", {"depth": 0}),
        ("depth", {"depth": 2.0}),
        ("hidden_size", {"hidden_size": 30, "num_heads": 3}),
        ("num_heads", {"num_heads": 5}),
        ("num_heads", {"num_heads": 0}),
        ("mlp_ratio", {"mlp_ratio": 0.01}),
        ("num_classes", {"num_classes": 0}),
        ("class_dropout_prob", {"num_classes": 5, "class_dropout_prob": 1.5}),
    ],
)
def test_values_that_do_not_fit_are_refused(key: str, params: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        DiT(**{**PARAMS, **params})


@pytest.mark.parametrize("shape", [(9, 9), (8, 4), (16, 16)])
def test_states_of_another_size_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"^input_size: .* 8, "):
        DiT(**PARAMS)(torch.zeros(1, 3, *shape), torch.tensor([1]))


@pytest.mark.parametrize("target", ["ldm_dkdm.networks.DiT", "models.DiT"])
def test_configs_may_name_it(target: str) -> None:
    network = build({"target": target, "params": {**PARAMS, "learn_sigma": False}}, NETWORKS)
    assert isinstance(network, DiT)
    assert (network.image_size, network.in_channels, network.out_channels, network.num_classes) == (8, 3, 3, None)


@pytest.mark.parametrize("ratio", [4, 237 / 224])  # the last times the width is 236.99999999999997
def test_what_no_tensor_of_a_dit_shows_may_be_told(ratio: float, tmp_path: Path) -> None:
    params = {"input_size": 8, "in_channels": 4, "hidden_size": 224, "depth": 1, "num_heads": 2, "mlp_ratio": ratio}
    network = randomised(DiT(**params, num_classes=1001, class_dropout_prob=0.0))
    torch.save(network.state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match="for example space=latent schedule=linear num_timesteps=1000"):
        load_model(tmp_path / "x.pt", num_heads=2)
    told = {"num_classes": 1001, "class_dropout_prob": 0.0, "schedule": "linear"}
    model = load_model(tmp_path / "x.pt", num_heads=2, **told)
    state, label = (torch.randn(2, 4, 8, 8), torch.tensor([0, 999])), torch.tensor([1, 1000])
    assert model.space.encoded and torch.equal(model.network(*state, label), network.eval()(*state, label))
    public = load_model(tmp_path / "x.pt", num_heads=2, schedule="linear", class_dropout_prob=0.15)
    assert public.num_classes == 1000 and public.network.y_embedder.dropout == 0.15


@pytest.mark.parametrize("name", ["folder", "x.safetensors", "x.pt"])
def test_a_null_label_that_is_not_the_model_s_is_refused(name: str, tmp_path: Path, capsys) -> None:
    model = DiffusionModel(_random(**LABELLED), schedule=NoiseSchedule("cosine", 20), space="pixel")
    path, told = tmp_path / name, {}
    if name == "x.pt":
        torch.save(model.network.state_dict(), path)
        told = {"num_heads": 4, "num_classes": 5, "class_dropout_prob": 0.1, "schedule": "cosine", "space": "pixel"}
    else:
        model.save(path, "folder" if name == "folder" else "safetensors")
    with pytest.raises(UserError, match=f"^null_label: 0, but .*{name}'s label for no class is 5; leave it out$"):
        load_model(path, **told, null_label=0)
    assert load_model(path, **told, null_label=5).null_label == 5
    assert not run_script("inspect_checkpoint.py", path)
    assert bool(re.search(r"null label +5\n", capsys.readouterr().out)) == (name != "x.pt")  # no tensor shows it
