"""diffusers pipelines in and out, against the library itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from safetensors.torch import load_file

from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.networks import DiT, UNet
from tests.cli import distil, run_script, write_yaml
from tests.parts import distill_config, model_folder, randomised
from tests.test_foreign import ADM, run_with

PIXEL = DiffusionConfig("cosine", 40, space="pixel")
BASE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


def pixel_model(network: torch.nn.Module) -> DiffusionModel:
    return DiffusionModel(network, schedule=schedule_of(PIXEL), space=PIXEL.space)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{f.parent.name}/{k}": v for f in sorted(folder.rglob("*.safetensors")) for k, v in load_file(f).items()}


def outputs(ours: torch.nn.Module, theirs: UNet2DModel, label: torch.Tensor | None) -> float:
    """Largest difference of the two networks' outputs, in units of their spread."""
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 30])
    with torch.no_grad():
        found = ours.eval()(x, t, label)
        wanted = theirs.eval()(x, t, class_labels=label).sample
    assert wanted.std() > 1e-3
    return ((found - wanted).abs().max() / wanted.std()).item()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"out_channels": 6, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32, **RESNETS},
        {"num_class_embeds": 5, "layers_per_block": 2},
        {"mid_block_type": None},
        {"mid_block_type": None, "resnet_time_scale_shift": "scale_shift"},  # the norm groups are the middle's
        {
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ],
)
def test_a_pipeline_of_the_library_is_read_and_written_back_bit_for_bit(change: dict[str, Any], tmp_path: Path) -> None:
    theirs = randomised(UNet2DModel(**{**BASE, **change}))
    scheduler = DDPMScheduler(40, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "in")
    model = open_teacher(run_with(tmp_path / "in"))
    label = torch.tensor([1, 4]) if "num_class_embeds" in change else None
    assert model.diffusion == replace(PIXEL, timestep_spacing="leading")
    load_model(tmp_path / "in").save(tmp_path / "out", "diffusers")
    first, second = weights(tmp_path / "in"), weights(tmp_path / "out")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert outputs(model.network, theirs, label) < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"use_new_attention_order": False, "num_heads": 1, "num_head_channels": 16},
        {"channel_mult": [1, 2], "attention_resolutions": [2]},
        {"channel_mult": [1, 2], "attention_resolutions": [2], "resblock_updown": False, "out_channels": 3},
        {"channel_mult": [1, 2], "attention_resolutions": [2], "num_classes": 6, "use_scale_shift_norm": False},
        {"middle_block": False},
        {"middle_block": False, "attention_resolutions": [], "num_heads": 1, "num_head_channels": -1},
    ],
)
def test_our_pixel_networks_compute_the_same_in_the_library(change: dict[str, Any], tmp_path: Path) -> None:
    params = {**ADM, **change}
    ours = randomised(UNet(**params))
    pixel_model(ours).save(tmp_path / "out", "diffusers")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.variance_type == (
        "learned_range" if params["out_channels"] == 6 else "fixed_small"
    )
    label = torch.tensor([1, 4]) if "num_classes" in params else None
    assert outputs(ours, pipeline.unet, label) < 1e-4


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_student_leaves_as_a_pipeline_that_samples_the_same(
    parameterization: str, first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "student", first_stage, parameterization)
    assert run_script("convert.py", folder, tmp_path / "out", "--to", "diffusers") == 0
    said = capsys.readouterr().out
    assert float(said.split("samples to ")[1].split()[0]) < 1e-4
    pipeline = LDMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[parameterization]
    assert pipeline.scheduler.config.steps_offset == 1 and pipeline.scheduler.config.set_alpha_to_one is False
    assert pipeline.vqvae.config.scaling_factor == 0.5
    parts = {f"{part}.{name}" for part in ("unet", "vqvae") for name in getattr(pipeline, part).state_dict()}
    assert read_tensors(tmp_path / "out").keys() == parts
    images = pipeline(batch_size=1, num_inference_steps=5, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    back, own = load_model(tmp_path / "out"), load_file(folder / "model.safetensors")
    assert all(torch.equal(back.network.state_dict()[name], value) for name, value in own.items())
    vq = load_file(first_stage / "model.safetensors")
    assert all(torch.equal(back.codec().autoencoder.state_dict()[name], value) for name, value in vq.items())


def test_a_pipeline_is_a_teacher_with_its_first_stage(first_stage: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", first_stage)
    assert run_script("convert.py", folder, tmp_path / "pipeline", "--to", "diffusers") == 0
    base = write_yaml(tmp_path / "run.yaml", distill_config(tmp_path / "pipeline", tmp_path / "logs"))
    assert distil("--base", base) == 0
    assert (tmp_path / "logs" / "run" / "samples").is_dir()


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("unet", "act_fn", "gelu", "act_fn: 'gelu'"),
        ("unet", "mid_block_scale_factor", 2, "mid_block_scale_factor: 2"),
        ("unet", "center_input_sample", True, "center_input_sample: True"),
        ("unet", "resnet_time_scale_shift", "scale_shift", "attn_norm_num_groups: None"),
        ("unet", "_class_name", "UNet2DConditionModel", "only UNet2DModel"),
        ("unet", "down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"], "SkipDownBlock2D"),
        ("unet", "layers_per_block", None, "unet/config.json: params.num_res_blocks: expected a whole number"),
        ("unet", "block_out_channels", [32], "unet/config.json: params.attention_resolutions"),
        ("unet", "block_out_channels", 32, "incomplete or does not fit"),
        ("scheduler", "beta_schedule", "exotic", "beta_schedule: 'exotic'"),
        ("scheduler", "prediction_type", "flow_prediction", "prediction_type: 'flow_prediction'"),
        ("scheduler", "clip_sample_range", "wide", "clip_sample_range: expected a number"),
    ],
)
def test_an_option_that_we_do_not_have_is_refused(
    part: str, key: str, value: object, words: str, tmp_path: Path
) -> None:
    scheduler = DDPMScheduler(40, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    DDPMPipeline(UNet2DModel(**BASE), scheduler).save_pretrained(tmp_path / "in")
    path = tmp_path / "in" / part / ("config.json" if part == "unet" else "scheduler_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError) as error:
        open_teacher(run_with(tmp_path / "in"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_the_library_cannot_express_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for bad, words in (
        (UNet(**{**ADM, "channel_mult": [2, 2, 2]}), "channel_mult"),
        (UNet(**{**ADM, "channel_mult": [1, 2, 4]}), "one head width"),
        (DiT(input_size=16, in_channels=3, hidden_size=32, depth=1, num_heads=2), "no pixel-space models"),
    ):
        with pytest.raises(UserError, match=words):
            pixel_model(bad).save(tmp_path / "out", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_the_library_s_own_ldm_pipeline_is_read(tmp_path: Path) -> None:
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        latent_channels=3,
        num_vq_embeddings=32,
        scaling_factor=1.0,
        layers_per_block=2,
    )
    scheduler = DDIMScheduler(20, 0.0015, 0.0195, "scaled_linear", clip_sample=False)
    LDMPipeline(randomised(vq), randomised(UNet2DModel(**BASE)), scheduler).save_pretrained(tmp_path / "in")
    config = tmp_path / "in" / "vqvae" / "config.json"
    plain = {key: value for key, value in json.loads(config.read_text()).items() if key != "scaling_factor"}
    config.write_text(json.dumps(plain))  # as in CompVis/ldm-celebahq-256
    assert load_model(tmp_path / "in").codec().scale_factor == 1
    base = distill_config(tmp_path / "in", tmp_path / "logs")
    base["student"]["params"] |= {"image_size": 16}
    assert distil("--base", write_yaml(tmp_path / "run.yaml", base)) == 0
