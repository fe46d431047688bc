"""What the files of a diffusers folder say beyond the usual is honoured, or refused by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file

from ldm_dkdm import UserError, load_model
from tests.cli import run_script
from tests.parts import randomised
from tests.test_diffusers_format import BASE

PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
Tensors = dict[str, torch.Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"
LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "latent_channels": 3,
    "layers_per_block": 2,
}


def network(**options: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return randomised(UNet2DModel(**{**BASE, **options})).eval()


def pixel(folder: Path, scheduler: Any = None) -> Path:
    DDPMPipeline(network(), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def latent(folder: Path, scheduler: Any = None, first_stage: Any = None, **options: Any) -> Path:
    first_stage = first_stage or VQModel(**LEVELS, num_vq_embeddings=8, scaling_factor=1.0)
    LDMPipeline(first_stage, network(**options), scheduler or DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def edit(file: Path, **keys: Any) -> None:
    tree = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"norm_groups": 8}, "norm_groups: not a key of diffusers' UNet2DModel; did you mean 'norm_num_groups'"),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift: 'ada_group' is not supported"),
        ({"in_channels": 6}, r"its network is conditioned on an image .*\(6 channels in, 3 out.* is not supported"),
    ],
)
def test_a_networks_key_is_refused_by_name(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = pixel(tmp_path / "pipe") / "unet" / "config.json"
    edit(file, decay=0.999, power=0.75)  # which EMAModel adds
    load_model(tmp_path / "pipe")
    edit(file, **keys)
    with pytest.raises(UserError, match=f"unet/config.json: {words}"):
        load_model(tmp_path / "pipe")


@pytest.mark.parametrize(
    "options",
    [{"act_fn": "swish"}, {"time_embedding_dim": 128}, {**PLAIN, "mid_block_type": None, "add_attention": False}],
)
def test_a_default_in_another_spelling_is_the_default(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = network(**options)
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "pipe").network(x, t), theirs(x, t).sample, atol=1e-5)


@pytest.mark.parametrize("keys", [{"act_fn": "swish"}, {"shift_factor": 0.0}])
def test_a_first_stages_default_in_another_spelling_is_the_default(keys: dict[str, Any], tmp_path: Path) -> None:
    folder = latent(tmp_path / "pipe", first_stage=AutoencoderKL(**LEVELS, sample_size=32))
    z = torch.randn(1, 3, 8, 8)
    usual = load_model(folder).codec().decode(z)
    edit(folder / "vqvae" / "config.json", **keys)
    assert torch.equal(load_model(folder).codec().decode(z), usual)
    edit(folder / "vqvae" / "config.json", act_fn="relu")
    with pytest.raises(UserError, match="act_fn relu is not supported"):
        load_model(folder).codec()


def test_a_networks_tensors_are_not_reshaped(tmp_path: Path) -> None:
    pixel(tmp_path / "pipe")
    name = "time_embedding.linear_1.weight"
    rewrite(tmp_path / "pipe" / "unet", lambda tensors: tensors.update({name: tensors[name].T}))
    with pytest.raises(UserError, match=rf"{name} is \(32, 128\) instead of \(128, 32\)"):
        load_model(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("first_stage", "keys", "change", "words"),
    [
        ("kl", {"scale_factor": 0.3}, None, "scale_factor: not a key of diffusers' AutoencoderKL"),
        ("kl", {"layers_per_block": 1}, None, r"tensors that this architecture does not have: decoder\.up_blocks"),
        ("kl", {"mid_block_add_attention": False}, None, r"does not have: decoder\.mid_block\.attentions"),
        ("kl", {}, lambda own: own.update({"decoder.extra.weight": torch.ones(3)}), r"have: decoder\.extra\.weight"),
        (
            "vq",
            {},
            lambda own: own.update({"quantize.embedding.weight": own["quantize.embedding.weight"].T}),
            r"quantize\.embedding\.weight is \(3, 8\) instead of \(8, 3\)",
        ),
    ],
)
def test_a_first_stage_that_is_not_its_configs_is_refused(
    first_stage: str, keys: dict[str, Any], change: Callable[[Tensors], object] | None, words: str, tmp_path: Path
) -> None:
    stage = AutoencoderKL(**LEVELS, sample_size=32) if first_stage == "kl" else None
    folder = latent(tmp_path / "pipe", first_stage=stage) / "vqvae"
    load_model(tmp_path / "pipe").codec()
    edit(folder / "config.json", **keys)
    if change:
        rewrite(folder, change)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "pipe").codec()


def test_a_first_stage_of_any_name_is_found(tmp_path: Path) -> None:
    latent(tmp_path / "pipe")
    usual = load_model(tmp_path / "pipe").codec().autoencoder.state_dict()
    (tmp_path / "pipe" / "vqvae").rename(tmp_path / "pipe" / "movq")
    edit(tmp_path / "pipe" / "model_index.json", vqvae=..., movq=["diffusers", "VQModel"])
    model = load_model(tmp_path / "pipe")
    assert model.diffusion.space == "latent"
    assert all(torch.equal(value, usual[name]) for name, value in model.codec().autoencoder.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
@pytest.mark.parametrize("part", ["unet", "vqvae"])
def test_wrappers_names_are_stripped_in_folders_too(part: str, prefix: str, tmp_path: Path) -> None:
    folder = latent(tmp_path / "pipe") / part
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save({prefix + name: value for name, value in tensors.items()}, folder / "diffusion_pytorch_model.bin")
    load_model(tmp_path / "pipe").codec()


def test_a_solvers_end_and_offset_are_honoured(tmp_path: Path) -> None:
    for offset, to_x0 in ((0, True), (1, False)):
        folder = latent(tmp_path / f"pipe{offset}", PNDMScheduler(steps_offset=offset, set_alpha_to_one=to_x0))
        schedule = load_model(folder).schedule
        assert (schedule.steps_offset, schedule.set_alpha_to_one) == (offset, to_x0)
    with pytest.raises(UserError, match="steps_offset: 5 is not supported"):
        load_model(pixel(tmp_path / "five", PNDMScheduler(steps_offset=5)))


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_betas_that_a_file_leaves_out_are_the_classs(name: str, tmp_path: Path) -> None:
    own = getattr(diffusers, name)()
    folder = pixel(tmp_path / "pipe", own)
    edit(folder / "scheduler" / "scheduler_config.json", beta_start=..., beta_end=...)
    assert torch.allclose(load_model(folder).schedule.alphas_cumprod.float(), own.alphas_cumprod, rtol=1e-4)


@pytest.mark.parametrize("key", ["rescale_betas_zero_snr", "clip_sample", "thresholding", "set_alpha_to_one"])
def test_text_is_not_taken_for_true(key: str, tmp_path: Path) -> None:
    folder = pixel(tmp_path / "pipe", DDIMScheduler(prediction_type="v_prediction"))
    edit(folder / "scheduler" / "scheduler_config.json", **{key: "false"})
    with pytest.raises(UserError, match=f"{key}: expected true or false, got 'false'"):
        load_model(folder)


def test_the_first_versions_prediction_is_read(tmp_path: Path) -> None:
    file = pixel(tmp_path / "pipe") / "scheduler" / "scheduler_config.json"
    edit(file, prediction_type=..., predict_epsilon=False)
    assert load_model(tmp_path / "pipe").parameterization == "x0"
    edit(file, predict_epsilon=True)
    assert load_model(tmp_path / "pipe").parameterization == "eps"
    edit(file, predict_epsilon=False, prediction_type="epsilon")
    with pytest.raises(UserError, match="predict_epsilon: False contradicts prediction_type: epsilon"):
        load_model(tmp_path / "pipe")


def test_the_index_may_not_name_another_process(tmp_path: Path) -> None:
    folder = pixel(tmp_path / "pipe")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(UserError, match=r"model_index\.json: scheduler: FlowMatchEulerDiscreteScheduler is another"):
        load_model(folder)
    edit(folder / "model_index.json", scheduler=["mine", "MyScheduler"])  # whose own config says what it is
    load_model(folder)


def test_a_solvers_own_walk_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    load_model(pixel(tmp_path / "pipe", scheduler))
    assert "use_karras_sigmas: ignored; --sampler decides how steps are spaced" in caplog.text


@pytest.mark.parametrize("make", [latent, pixel])
def test_a_variance_survives_a_conversion(make: Callable[..., Path], tmp_path: Path) -> None:
    own = DDPMScheduler(variance_type="fixed_large", steps_offset=1, clip_sample=make is pixel)
    folder = make(tmp_path / "pipe", own)
    load_model(folder).save(tmp_path / "again", format="diffusers")
    again = load_model(tmp_path / "again")
    assert again.schedule.variance == load_model(folder).schedule.variance == "beta"
    config = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert DDPMScheduler.from_config(config).config.variance_type == "fixed_large"


def test_compvis_has_no_learned_variance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    folder = latent(tmp_path / "pipe", scheduler, out_channels=6)
    assert run_script("convert.py", folder, tmp_path / "model.ckpt", "--to", "compvis") == 2
    assert "error: --to: CompVis's code has no learned variance" in capsys.readouterr().err
    assert not (tmp_path / "model.ckpt").exists()
