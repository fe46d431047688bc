"""What a CompVis config and its checkpoint say beyond the usual is honoured, or refused by its name."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.checkpoints.compvis import ema_name
from ldm_dkdm.checkpoints.contents import clipping_of
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet
from tests.cli import run_script
from tests.parts import UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint
from tests.test_foreign import run_with

State = dict[str, torch.Tensor]
STEPS = 20
HINTS = {"image_size": 8, "num_head_channels": 32}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    unet, vq = randomised(UNet(**UNET_PARAMS)), randomised(VQModel(**VQ_PARAMS))
    return write_compvis_checkpoint(tmp_path / "model.ckpt", unet, vq, NoiseSchedule(num_timesteps=STEPS))


def config(checkpoint: Path, unet: dict[str, Any] | None = None, target: str = "LatentDiffusion", **model: Any) -> Path:
    own = {"timesteps": STEPS, "linear_start": 0.0015, "linear_end": 0.0195, "image_size": 8, **model}
    params = {"unet_config": {"params": {**UNET_PARAMS, **(unet or {})}}, **own}
    tree = {"model": {"target": f"ldm.models.diffusion.ddpm.{target}", "params": params}}
    checkpoint.with_suffix(".yaml").write_text(yaml.safe_dump(tree))
    return checkpoint


def changed(checkpoint: Path, change: Callable[[State], object]) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    change(content["state_dict"])
    torch.save(content, checkpoint)
    return checkpoint


def without_schedule(checkpoint: Path) -> Path:
    return changed(checkpoint, lambda state: [state.pop(name) for name in ("betas", "alphas_cumprod")])


def parameter(model: DiffusionModel) -> torch.Tensor:
    return model.network.state_dict()["time_embed.0.bias"]


def test_states_have_the_models_side(checkpoint: Path) -> None:
    assert load_model(config(checkpoint, image_size=16)).shape == (3, 16, 16)  # the UNet says 8, which nobody reads


def test_the_configs_weights_are_taken(checkpoint: Path) -> None:
    averaged, raw = load_model(config(checkpoint)), load_model(config(checkpoint, use_ema=False))
    assert torch.equal(parameter(raw), parameter(averaged) + 1) and raw.info["weights_kind"] == "raw"
    assert torch.equal(parameter(load_model(checkpoint, use_ema=True)), parameter(averaged))  # a hint wins


@pytest.mark.parametrize("other", [{"history": [{"loss": torch.zeros(1)}]}, {"stats": {0: {"mean": torch.zeros(1)}}}])
def test_tensors_in_lists_or_under_numbers_are_not_read_in_place_of_the_weights(
    other: dict[str, Any], checkpoint: Path
) -> None:
    torch.save({**other, "weights": torch.load(checkpoint, weights_only=True)["state_dict"]}, checkpoint)
    found = load_model(checkpoint, **HINTS)
    assert found.format == "CompVis latent diffusion" and found.schedule.num_timesteps == STEPS


def test_ema_weights_of_some_layers_are_completed(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load_model(config(checkpoint))
    changed(checkpoint, lambda state: state.pop(ema_name("time_embed.0.bias")))
    partial = load_model(checkpoint)
    assert torch.equal(parameter(partial), parameter(whole) + 1) and "EMA weights of 127 of 128 tensors" in caplog.text
    name = "out.2.bias"
    assert torch.equal(partial.network.state_dict()[name], whole.network.state_dict()[name])


def test_a_tensor_without_ema_is_no_less_unexpected(checkpoint: Path) -> None:
    changed(checkpoint, lambda state: state.update({"model.diffusion_model.id_predictor.weight": torch.ones(3)}))
    with pytest.raises(UserError, match=r"unexpected: id_predictor\.weight"):
        load_model(checkpoint, **HINTS)


@pytest.mark.parametrize(
    ("keys", "betas"),
    [
        ({"beta_schedule": "sqrt", "linear_start": 0.001, "linear_end": 0.04}, np.linspace(0.001, 0.04, STEPS) ** 0.5),
        (
            {"beta_schedule": "cosine", "cosine_s": 0.05},
            [
                min(
                    0.999,
                    1
                    - math.cos((i + 1) / STEPS / 1.05 * math.pi / 2 + 0.05 / 1.05 * math.pi / 2) ** 2
                    / math.cos(i / STEPS / 1.05 * math.pi / 2 + 0.05 / 1.05 * math.pi / 2) ** 2,
                )
                for i in range(STEPS)
            ],
        ),
    ],
)
def test_schedules_without_a_name_here_are_honoured(keys: dict[str, Any], betas: Any, checkpoint: Path) -> None:
    model = load_model(config(without_schedule(checkpoint), **keys))
    assert np.allclose(model.schedule.betas, betas, rtol=1e-9)


def test_an_unknown_schedule_is_named_and_a_hint_replaces_it(checkpoint: Path) -> None:
    config(without_schedule(checkpoint), beta_schedule="exotic")
    with pytest.raises(UserError, match=r"model\.yaml: beta_schedule: 'exotic' is not one of linear, .*, sqrt; set it"):
        load_model(checkpoint)
    assert load_model(checkpoint, schedule="linear", num_timesteps=STEPS).schedule.num_timesteps == STEPS


@pytest.mark.parametrize(("keys", "words"), [({"timesteps": 30}, "timesteps: 30"), ({"linear_end": 0.1}, "linear_end")])
def test_a_schedule_that_is_not_the_stored_one_is_refused(keys: dict[str, Any], words: str, checkpoint: Path) -> None:
    config(checkpoint, **keys)
    with pytest.raises(UserError, match=rf"model\.yaml: .*trained with .*{words}|model\.yaml: {words}"):
        load_model(checkpoint)


def test_a_stored_schedule_that_ends_in_noise_is_read(checkpoint: Path) -> None:
    for betas in (None, [0.01 * (i + 1) for i in range(STEPS)]):
        own = NoiseSchedule(num_timesteps=STEPS, rescale_betas_zero_snr=True, betas=betas)
        stored = own.alphas_cumprod.float()
        changed(checkpoint, lambda state, stored=stored: state.update(alphas_cumprod=stored))
        found = load_model(checkpoint, **HINTS, parameterization="v").schedule
        assert found.ends_in_noise and torch.allclose(found.alphas_cumprod, own.alphas_cumprod, rtol=1e-4, atol=1e-7)
    with pytest.raises(UserError, match="eps says nothing about x_0"):
        load_model(checkpoint, **HINTS)


def test_a_half_precision_schedule_whose_end_underflows_is_no_other(checkpoint: Path) -> None:
    own = NoiseSchedule("cosine", 4000)
    changed(checkpoint, lambda state: state.update(alphas_cumprod=own.alphas_cumprod.half()))
    found = load_model(checkpoint, **HINTS).schedule
    assert found.name == "cosine" and not found.ends_in_noise and found.num_timesteps == 4000


def test_neutral_keys_of_later_unets_and_first_stages_are_no_obstacle(checkpoint: Path) -> None:
    ddconfig = {**VQ_PARAMS["ddconfig"], "attn_type": "vanilla-xformers", "resolution": "${size}"}
    later = {"adm_in_channels": None, "disable_self_attentions": None, "use_linear_in_transformer": True}
    config(checkpoint, later, first_stage_config={"params": {**VQ_PARAMS, "ddconfig": ddconfig}})
    load_model(checkpoint).codec()


def test_the_variance_is_the_configs_or_the_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_model(config(checkpoint)).schedule.variance == "posterior"
    assert load_model(config(checkpoint, v_posterior=1.0)).schedule.variance == "beta"
    with pytest.raises(UserError, match=r"v_posterior: 0\.5 is not supported, only 0 and 1"):
        load_model(config(checkpoint, v_posterior=0.5))
    checkpoint.with_suffix(".yaml").unlink()
    changed(checkpoint, lambda state: state.update(posterior_variance=state["betas"]))
    assert load_model(checkpoint, **HINTS).schedule.variance == "beta"
    assert run_script("inspect_checkpoint.py", checkpoint, "--config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)["diffusion"]
    assert printed.pop("variance") == "beta"
    teacher = open_teacher(run_with(checkpoint, DiffusionConfig(**printed), params=HINTS))  # a section without it
    assert teacher.schedule.variance == "beta"


@pytest.mark.parametrize(
    ("target", "keys", "clips"),
    [
        ("DDPM", {}, 1.0),
        ("DDPM", {"clip_denoised": False}, None),
        ("LatentDiffusion", {"first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"}}, None),
    ],
)
def test_models_of_images_are_in_pixel_space(
    target: str, keys: dict[str, Any], clips: float | None, checkpoint: Path
) -> None:
    def drop(state: State) -> None:
        for name in [name for name in state if name.startswith("first_stage_model.")]:
            del state[name]

    model = load_model(config(changed(checkpoint, drop), target=target, **keys))
    assert model.diffusion.space == "pixel" and clipping_of(model.diffusion).limit == clips
    assert model.sample(1, steps=2).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}, "num_heads_upsample: 4 is not supported"),
        ({"dims": 3}, "dims: 3 is not supported, only 2"),
        ({"n_embed": 8}, "n_embed: 8 is not supported, only None"),
        ({"groups": 8}, "groups: not a key of CompVis's UNetModel"),
    ],
)
def test_a_unet_of_another_kind_is_refused_by_its_key(unet: dict[str, Any], words: str, checkpoint: Path) -> None:
    with pytest.raises(UserError, match=rf"model\.yaml: model\.params\.unet_config\.params\.{words}"):
        load_model(config(checkpoint, unet))


def test_a_first_stage_of_another_kind_is_refused_by_its_key(checkpoint: Path) -> None:
    ddconfig = {**VQ_PARAMS["ddconfig"], "tanh_out": True}
    model = load_model(config(checkpoint, first_stage_config={"params": {**VQ_PARAMS, "ddconfig": ddconfig}}))
    with pytest.raises(UserError, match=r"model\.yaml: model\.params\.first_stage_config\.params\.ddconfig\.tanh_out"):
        model.codec()
    other = {**ddconfig, "ch": 64}  # of another autoencoder than the file's
    load_model(config(checkpoint, first_stage_config={"params": {**VQ_PARAMS, "ddconfig": other}})).codec()


@pytest.mark.parametrize(
    ("keys", "unet", "words"),
    [
        ({"scale_factor": 0.9, "scale_by_std": False}, {}, r"scale_factor: 0\.9, but .*model\.ckpt stores 0\.5"),
        ({"channels": 7}, {}, r"channels: 7, but the UNet of .*model\.ckpt has 3"),
        ({"conditioning_key": "concat"}, {}, "conditioning_key: 'concat', but the UNet of .* takes no such condition"),
        ({"conditioning_key": "adm"}, {}, "conditioning_key: 'adm', but the UNet of .* takes no such condition"),
        ({}, {"num_classes": 10}, r"unet_config\.params\.num_classes: 10, but the UNet of .* has no labels"),
        ({"unet_config": {"target": "my.own.UNet", "params": UNET_PARAMS}}, {}, "unet_config.target: 'my.own.UNet'"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused_by_its_key(
    keys: dict[str, Any], unet: dict[str, Any], words: str, checkpoint: Path
) -> None:
    changed(checkpoint, lambda state: state.update(scale_factor=torch.tensor(0.5)))
    with pytest.raises(UserError, match=rf"model\.yaml: model\.params\.{words}"):
        load_model(config(checkpoint, unet, **keys))


def test_a_config_as_releases_have_it_does_not_contradict_the_file(checkpoint: Path) -> None:
    changed(checkpoint, lambda state: state.update(scale_factor=torch.tensor(0.5)))
    keys = {"scale_by_std": True, "scale_factor": 0.18215, "channels": 3, "cond_stage_config": "__is_unconditional__"}
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    keys |= {"unet_config": {"target": target, "params": UNET_PARAMS}, "conditioning_key": None}
    stage = {"target": "ldm.models.autoencoder.VQModelInterface", "params": VQ_PARAMS}
    model = load_model(config(checkpoint, **keys, first_stage_config=stage))
    assert model.codec().scale_factor == 0.5


@pytest.mark.parametrize("key", ["embed_dim", "n_embed", "ddconfig.out_ch"])
def test_a_first_stage_that_the_tensors_contradict_is_refused_by_its_key(key: str, checkpoint: Path) -> None:
    params: dict[str, Any] = {**VQ_PARAMS, "ddconfig": dict(VQ_PARAMS["ddconfig"])}
    (params["ddconfig"] if "." in key else params)[key.rpartition(".")[2]] = 5
    with pytest.raises(UserError, match=rf"first_stage_config\.params\.{key}: 5, but the tensors of .* say \d+"):
        load_model(config(checkpoint, first_stage_config={"params": params})).codec()


def test_compvis_files_are_written_with_what_its_code_samples_by(
    teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(teacher_folder)
    process = model.diffusion
    for key, value in {"clip_sample": True, "thresholding": True}.items():
        refused = load_model(teacher_folder)
        refused.diffusion = type(process)(**{**vars(process), key: value})
        with pytest.raises(UserError, match=f"format: CompVis's code has no {key}"):
            refused.save(tmp_path / f"{key}.ckpt", format="compvis")
    model.schedule.variance, model.schedule.timestep_spacing = "beta", "trailing"
    with caplog.at_level(logging.WARNING):
        model.save(tmp_path / "theirs.ckpt", format="compvis")
    assert "not written: timestep_spacing: trailing" in caplog.text
    assert load_model(tmp_path / "theirs.ckpt").schedule.variance == "beta"
    (tmp_path / "theirs.yaml").unlink()
    assert load_model(tmp_path / "theirs.ckpt", **HINTS).schedule.variance == "beta"
