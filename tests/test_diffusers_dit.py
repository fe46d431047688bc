"""DiTPipeline folders of diffusers: the same outputs and samples as the library's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ldm_dkdm import UserError, load_model
from ldm_dkdm.networks import DiT
from tests.cli import run_script
from tests.parts import randomised

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 10,
}
NAMES = {str(i): f"thing {i}, other word" for i in range(10)}


def pipeline(folder: Path, shared: bool = False, **options: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    network = randomised(DiTTransformer2DModel(**SMALL | options)).eval()
    if shared:  # as in released files
        first, *others = [block.norm1.emb for block in network.transformer_blocks]
        for other in others:
            other.load_state_dict(first.state_dict())
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, sample_size=16, **kinds).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(network, vae, scheduler).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": NAMES}))  # as in released files
    return network


def test_the_public_layout_refuses_what_its_code_lacks(tmp_path: Path) -> None:
    pipeline(tmp_path / "pipe")
    with pytest.raises(UserError, match="DiT's code has no freq_shift, norm_eps, own_embedders; choose diffusers"):
        load_model(tmp_path / "pipe").save(tmp_path / "x.pt", "dit")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("shared", [True, False])
def test_it_is_written_back_as_it_was_read(shared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = pipeline(tmp_path / "in", shared)
    assert run_script("convert.py", tmp_path / "in", tmp_path / "out", "--to", "diffusers") == 0
    said = capsys.readouterr().out
    assert "the same noise through diffusers gives the same samples" in said and "class_labels" not in said
    source, back = load_model(tmp_path / "in"), load_model(tmp_path / "out")
    assert (back.node, back.diffusion, back.info) == (source.node, source.diffusion, source.info)
    assert back.null_label == source.null_label and back.codec().scale_factor == source.codec().scale_factor
    pairs = zip(back.network.state_dict().values(), source.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    library = DiTPipeline.from_pretrained(tmp_path / "out")
    found = library.transformer.state_dict()
    assert all(torch.equal(found[name], value) for name, value in theirs.state_dict().items())
    assert library.labels["thing 3"] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"freq_shift": 0}, r"freq_shift 0 \(only class_dropout_prob 0.1, freq_shift 1, mlp_ratio 4.0\)"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio 2.0 \(only"),
        ({"num_classes": None}, "takes labels"),
    ],
)
def test_what_the_library_s_network_cannot_hold_is_refused_by_name(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    pipeline(tmp_path / "in", shared=True)
    model = load_model(tmp_path / "in")
    params = {**model.node.params, **change}
    model.network, model.node = DiT(**params), replace(model.node, params=params)
    with pytest.raises(UserError, match=words):
        model.save(tmp_path / "out", "diffusers")
    with pytest.raises(UserError, match=r"choose safetensors$"):
        model.save(tmp_path / "x.pt", "dit")


@pytest.mark.parametrize(
    ("shared", "options"),
    [(False, {}), (True, {}), (True, {"out_channels": None, "patch_size": 4, "norm_eps": 1e-6})],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_outputs_equal_the_library_s(
    shared: bool, options: dict[str, Any], dtype: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    theirs = pipeline(tmp_path, shared, **options).to(dtype)
    model = load_model(tmp_path)
    network = model.network.to(dtype)
    assert isinstance(network, DiT) and network.null_label == 10
    assert bool(len(network.embedders)) is not shared
    x, t, label = torch.randn(4, 4, 8, 8, dtype=dtype), torch.tensor([0, 3, 500, 999]), torch.tensor([0, 9, 4, 10])
    found, wanted = network(x, t, label), theirs(x, t, class_labels=label).sample
    assert wanted.std() > 1e-3 and found.shape == wanted.shape
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


@torch.no_grad()
def test_a_guided_sample_equals_the_pipeline_s(tmp_path: Path) -> None:
    theirs = pipeline(tmp_path)
    model = load_model(tmp_path, guidance=3.0)
    assert model.info["classes"][:2] == ["0 thing 0", "1 thing 1"]
    assert (model.diffusion.schedule, model.diffusion.space) == ("linear", "latent")
    assert (model.schedule.beta_start, model.schedule.beta_end) == (0.0001, 0.02)
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([40, 40]), torch.tensor([3, 7])
    both = theirs(torch.cat([x, x]), torch.cat([t, t]), class_labels=torch.tensor([3, 7, 10, 10])).sample[:, :4]
    wanted = both[2:] + 3.0 * (both[:2] - both[2:])
    assert (model.predict(x, t, label).eps - wanted).abs().max() < 1e-5 * wanted.abs().max()
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(10)
    assert [int(t) for t in scheduler.timesteps][::-1] == list(range(0, 1000, 100))
    assert model.sample(2, steps=2, labels=[3, 7]).shape == (2, 16, 16, 3)


def test_a_network_without_its_pipeline_needs_a_schedule(tmp_path: Path) -> None:
    pipeline(tmp_path)
    (tmp_path / "transformer").rename(tmp_path / "alone")
    with pytest.raises(UserError, match="stores no noise schedule"):
        load_model(tmp_path / "alone")
    model = load_model(tmp_path / "alone", schedule="linear", space="latent", first_stage=tmp_path / "vae")
    assert model.num_classes == 10 and model.codec().scale_factor == 0.18215


def test_an_older_class_name_and_stored_positions_are_read(tmp_path: Path) -> None:
    network = pipeline(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}))
    state = {**network.state_dict(), "pos_embed.pos_embed": network.pos_embed.pos_embed}
    torch.save(state, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    own = load_model(tmp_path).network.state_dict()["pos_embed"]
    torch.testing.assert_close(own, network.pos_embed.pos_embed)


@pytest.mark.parametrize(
    ("key", "value"), [("norm_type", "ada_norm_single"), ("activation_fn", "geglu"), ("out_channels", 5), ("zeta", 1)]
)
def test_an_option_that_we_do_not_have_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    pipeline(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"config.json: {key}"):
        load_model(tmp_path)


def test_a_conversion_says_how_the_pipeline_takes_another_number_of_classes(tmp_path: Path, capsys) -> None:
    pipeline(tmp_path / "in", shared=True)
    assert run_script("convert.py", tmp_path / "in", tmp_path / "out", "--to", "diffusers") == 0
    assert "of 10 classes: call DiTPipeline with guidance_scale=1;" in capsys.readouterr().out
