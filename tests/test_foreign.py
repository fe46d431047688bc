"""Checkpoints of other code bases: what their tensors say, and what must be given."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.checkpoints import Source, read
from ldm_dkdm.checkpoints.compvis import name_schedule
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import infer_first_stage
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import (
    DiffusionConfig,
    DistillConfig,
    DistillRun,
    FirstStageConfig,
    NetworkConfig,
    TeacherConfig,
    TrainerConfig,
)
from ldm_dkdm.first_stage import FIRST_STAGES, VQModel
from ldm_dkdm.networks import DiT, UNet
from tests.cli import run_script
from tests.parts import DIFFUSION, UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint

ADM: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "num_res_blocks": 2,
    "attention_resolutions": [2, 4],
    "channel_mult": [1, 2, 2],
    "num_heads": 4,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}
PIXEL = DiffusionConfig("cosine", 50, space="pixel")


def run_with(ckpt: Path, diffusion: DiffusionConfig | None = None, **teacher: Any) -> DistillRun:
    """A distillation of which only the teacher matters."""
    return DistillRun(
        TeacherConfig(str(ckpt), **teacher),
        NetworkConfig("", {}),
        DistillConfig(1, rho=1.0),
        TrainerConfig(1, 1.0),
        diffusion=diffusion,
    )


def same(first: nn.Module, second: nn.Module, label: torch.Tensor | None = None) -> bool:
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 40])
    with torch.no_grad():
        return torch.equal(first.eval()(x, t, label), second.eval()(x, t, label))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"resblock_updown": False},
        {"use_scale_shift_norm": False, "num_heads": 1, "num_head_channels": 32},
        {"num_classes": 7},
        {"channel_mult": [1, 2, 3, 4], "attention_resolutions": [8], "num_res_blocks": 1},
        {"channel_mult": [2], "attention_resolutions": [], "use_new_attention_order": False},
    ],
)
def test_a_bare_unet_is_inferred_but_for_what_shapes_cannot_tell(change: dict[str, Any], tmp_path: Path) -> None:
    params = {**ADM, **change}
    unet, path = randomised(UNet(**params)), tmp_path / "model.pt"
    torch.save(unet.state_dict(), path)
    told = (
        "image_size",
        "use_new_attention_order",
        "num_head_channels" if "num_head_channels" in params else "num_heads",
    )
    model = open_teacher(run_with(path, PIXEL, params={key: params[key] for key in told}))
    assert same(model.network, unet, torch.tensor([1, 6]) if "num_classes" in params else None)
    assert model.shape == (3, 16, 16)
    for key in told:
        partly = {k: params[k] for k in told if k != key}
        with pytest.raises(UserError, match=key):
            open_teacher(run_with(path, PIXEL, params=partly))
    with pytest.raises(UserError, match=r"stores no noise schedule; set it, for example diffusion.space=pixel"):
        open_teacher(run_with(path, params={key: params[key] for key in told}))


def test_a_given_value_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    torch.save(UNet(**ADM).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"teacher.params.model_channels: 64, but the tensors of .* say 32"):
        open_teacher(run_with(tmp_path / "model.pt", PIXEL, params={"model_channels": 64}))


def test_a_mistyped_parameter_is_named_before_the_one_it_leaves_missing(tmp_path: Path) -> None:
    torch.save(UNet(**ADM).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"teacher.params.num_hed_channels: .*did you mean 'num_head_channels'\?"):
        open_teacher(run_with(tmp_path / "model.pt", PIXEL, params={"num_hed_channels": 32}))


@pytest.mark.parametrize(("classes", "learn_sigma"), [(None, True), (1000, True), (12, False)])
def test_a_dit_file_is_unwrapped_and_inferred(classes: int | None, learn_sigma: bool, tmp_path: Path) -> None:
    params = {"input_size": 16, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
    nets = [randomised(DiT(**params, num_classes=classes, learn_sigma=learn_sigma)) for _ in range(2)]
    path, args = tmp_path / "DiT.pt", argparse.Namespace(model="DiT", num_classes=classes)
    torch.save({"model": nets[0].state_dict(), "ema": nets[1].state_dict(), "opt": {"state": {}}, "args": args}, path)
    given = {"num_heads": 2} | ({"num_classes": 12, "class_dropout_prob": 0.1} if classes == 12 else {})
    label = None if classes is None else torch.tensor([1, 6])
    assert same(open_teacher(run_with(path, PIXEL, params=given)).network, nets[1], label)
    assert same(open_teacher(run_with(path, PIXEL, params=given, use_ema=False)).network, nets[0], label)
    with pytest.raises(UserError, match="num_heads"):
        open_teacher(run_with(path, PIXEL))


@pytest.fixture(scope="module")
def compvis(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module]:
    unet, vq = randomised(UNet(**UNET_PARAMS)), randomised(VQModel(**VQ_PARAMS))
    path = tmp_path_factory.mktemp("foreign") / "model.ckpt"
    return write_compvis_checkpoint(path, unet, vq, schedule_of(DIFFUSION)), unet, vq


def test_a_compvis_file_tells_its_schedule_and_its_first_stage(compvis: tuple[Path, nn.Module, nn.Module]) -> None:
    path, unet, vq = compvis
    given = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
    model = open_teacher(run_with(path, params=given))
    assert model.diffusion == DIFFUSION
    assert all(map(torch.equal, model.network.state_dict().values(), unet.state_dict().values()))
    codec = model.codec()
    assert all(map(torch.equal, codec.autoencoder.state_dict().values(), vq.state_dict().values()))
    rebuilt = build({"target": codec.target, "params": codec.params}, FIRST_STAGES, "first_stage.params")
    load_strictly(rebuilt, vq.state_dict(), path)
    latents = torch.randn(1, *model.shape)
    assert torch.equal(rebuilt.eval().decode(latents), vq.eval().decode(latents))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_still_tells_its_schedule(dtype: torch.dtype, tmp_path: Path) -> None:
    long = DiffusionConfig()
    state = {f"model.diffusion_model.{k}": v for k, v in randomised(UNet(**UNET_PARAMS)).state_dict().items()}
    state["alphas_cumprod"] = schedule_of(long).alphas_cumprod
    torch.save({"state_dict": {name: value.to(dtype) for name, value in state.items()}}, tmp_path / "half.ckpt")
    given = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
    assert open_teacher(run_with(tmp_path / "half.ckpt", params=given)).diffusion == long
    open_teacher(run_with(tmp_path / "half.ckpt", long, params=given))  # and agrees with the same one configured
    with pytest.raises(UserError, match="was trained with"):
        open_teacher(run_with(tmp_path / "half.ckpt", DiffusionConfig("linear"), params=given))


@pytest.mark.parametrize("scale", [torch.zeros(2), torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(float("nan"))])
def test_a_scale_that_is_none_is_refused(
    scale: torch.Tensor, compvis: tuple[Path, nn.Module, nn.Module], tmp_path: Path
) -> None:
    content = torch.load(compvis[0], weights_only=True)
    content["state_dict"]["scale_factor"] = scale
    torch.save(content, tmp_path / "model.ckpt")
    given = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
    run = run_with(tmp_path / "model.ckpt", params=given)
    with pytest.raises(UserError, match=r"scale_factor is not a number above 0; .*first_stage\.scale_factor"):
        open_teacher(run)
    assert open_teacher(replace(run, first_stage=FirstStageConfig(scale_factor=0.5))).codec().scale_factor == 0.5


def test_levels_without_end_are_refused_at_once(compvis: tuple[Path, nn.Module, nn.Module]) -> None:
    tensors = {**compvis[2].state_dict(), "encoder.down.99999999999.block.0.x": torch.zeros(1)}
    with pytest.raises(UserError, match="lacks blocks"):
        infer_first_stage(tensors, 8, Path("x.ckpt"))


def test_the_other_attention_order_of_a_compvis_file_may_be_told(compvis: tuple[Path, nn.Module, nn.Module]) -> None:
    given = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
    told = open_teacher(run_with(compvis[0], params={**given, "use_new_attention_order": True}))
    assert told.node.params["use_new_attention_order"] is True
    assert open_teacher(run_with(compvis[0], params=given)).node.params["use_new_attention_order"] is False


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(),
        DiffusionConfig("scaled_linear", 1000, 0.00085, 0.012),
        DiffusionConfig("linear", 4000, 1e-4, 0.02),
        DiffusionConfig("cosine", 1000),
    ],
)
def test_a_stored_schedule_is_named(config: DiffusionConfig) -> None:
    found = name_schedule(schedule_of(config).alphas_cumprod.float())
    assert replace(found, beta_start=0.1, beta_end=0.2) == replace(config, beta_start=0.1, beta_end=0.2)
    assert torch.allclose(schedule_of(found).alphas_cumprod, schedule_of(config).alphas_cumprod, rtol=1e-3, atol=1e-7)


def test_a_schedule_without_a_name_keeps_its_own_betas_and_rising_values_are_none() -> None:
    stored = torch.linspace(0.99, 0.01, 100)
    found = name_schedule(stored)
    assert found.betas is not None and found.num_timesteps == 100
    torch.testing.assert_close(schedule_of(found).alphas_cumprod, stored.double(), rtol=1e-6, atol=0)
    assert name_schedule(stored.flip(0)) is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["unet.lora_A.weight"], "is a LoRA adapter"),
        (["lora_unet_down_blocks_0.lora_down.weight"], "is a LoRA adapter"),
        (["network.out.2.weight"], "or name the run"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "belongs in first_stage.ckpt"),
        (["down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight"], "without its config.json"),
        (["total_t", "total_x_t_1"], "belongs in distill.pool_from"),
        (["layer1.0.conv1.weight", "fc.weight"], "no known diffusion network (keys: fc.weight"),
        (["time_embed.0.weight", "input_blocks.0.0.weight", "out.0.weight"], "classifier"),
    ],
)
def test_what_else_a_file_holds_is_said(names: list[str], words: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        open_teacher(run_with(tmp_path / "x.pt", PIXEL))
    assert words in str(error.value)


def test_a_unet_with_cross_attention_is_refused_by_its_condition(tmp_path: Path) -> None:
    tensors = {f"model.diffusion_model.{k}": v for k, v in UNet(**ADM).state_dict().items()}
    tensors["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"] = torch.zeros(2, 2)
    torch.save({"state_dict": tensors}, tmp_path / "sd.ckpt")
    with pytest.raises(UserError, match=r"is a text-conditional UNet .* cross-attention"):
        open_teacher(run_with(tmp_path / "sd.ckpt", DIFFUSION))
    tensors["cond_stage_model.embedding.weight"] = torch.zeros(11, 4)
    torch.save({"state_dict": tensors}, tmp_path / "cin.ckpt")
    with pytest.raises(UserError, match="is a class-conditional UNet whose condition comes by cross-attention"):
        open_teacher(run_with(tmp_path / "cin.ckpt", DIFFUSION))


def test_weights_behind_the_prefix_of_data_parallel_training_load(tmp_path: Path) -> None:
    unet = randomised(UNet(**ADM))
    torch.save({f"module.{k}": v for k, v in unet.state_dict().items()}, tmp_path / "x.pt")
    assert read(Source(tmp_path / "x.pt")).params["model_channels"] == 32
    told = {key: ADM[key] for key in ("image_size", "num_heads", "use_new_attention_order")}
    assert same(open_teacher(run_with(tmp_path / "x.pt", PIXEL, params=told)).network, unet)


@pytest.mark.parametrize(
    ("lost", "words"),
    [("quantize.embedding.weight", "incomplete.*quantize.embedding"), ("decoder.conv_out.weight", "is incomplete")],
)
def test_a_first_stage_that_lacks_tensors_is_refused(
    lost: str, words: str, compvis: tuple[Path, nn.Module, nn.Module], tmp_path: Path
) -> None:
    content = torch.load(compvis[0], weights_only=True)
    del content["state_dict"][f"first_stage_model.{lost}"]
    torch.save(content, tmp_path / "x.ckpt")
    given = {key: UNET_PARAMS[key] for key in ("image_size", "num_head_channels")}
    with pytest.raises(UserError, match=words):
        open_teacher(run_with(tmp_path / "x.ckpt", params=given)).codec()


@pytest.mark.parametrize(("inputs", "outputs", "prefix"), [(6, 3, ""), (7, 6, ""), (6, 3, "model.diffusion_model.")])
def test_a_network_with_an_image_concatenated_to_its_input_is_refused(
    inputs: int, outputs: int, prefix: str, tmp_path: Path
) -> None:
    unet = UNet(**{**ADM, "in_channels": inputs, "out_channels": outputs})
    torch.save({prefix + name: value for name, value in unet.state_dict().items()}, tmp_path / "sr.pt")
    with pytest.raises(UserError, match=rf"sr\.pt: .*concatenated to its input \({inputs} channels in, {outputs} out"):
        read(Source(tmp_path / "sr.pt"))


def test_super_resolution_is_told_from_latents_of_six_channels_by_the_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, told = tmp_path / "upsampler.pt", {"image_size": 16, "num_heads": 4, "use_new_attention_order": True}
    torch.save(UNet(**{**ADM, "in_channels": 6}).state_dict(), file)
    for given in ({}, {**told, "schedule": "linear"}):
        with pytest.raises(
            UserError, match=r"upsampler\.pt: .*super-resolution.* not supported; .* 6 channels set space=latent"
        ):
            load_model(file, **given)
    with pytest.raises(UserError, match=r"set diffusion\.space=latent"):
        open_teacher(run_with(file, PIXEL, params=told))
    for flags in ([], ["--config"]):
        assert run_script("inspect_checkpoint.py", file, *flags) == 0
        assert "super-resolution" in capsys.readouterr().out
    model = load_model(file, **told, schedule="linear", space="latent")
    assert model.shape == (6, 16, 16)
    model.save(tmp_path / "latents.pt", "adm")
    images = DiffusionModel(model.network, space="pixel")
    images.save(tmp_path / "images.safetensors", "safetensors")
    assert load_model(tmp_path / "images.safetensors").shape == (6, 16, 16)
    with pytest.raises(UserError, match="super-resolution; choose safetensors"):
        images.save(tmp_path / "images.pt", "adm")
