"""Keys of diffusers' schedulers: the same states as the library's, or a refusal that names the key."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.schedulers import scheduling_ddpm

from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.checkpoints.contents import Hints
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageConfig, TeacherConfig
from ldm_dkdm.diffusion.samplers import ddim, ddpm, last
from ldm_dkdm.model import open_model
from tests.cli import run_script
from tests.parts import randomised
from tests.test_diffusers_format import BASE

SHORT: dict[str, Any] = {"num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.4}
BETAS = [0.01 + 0.002 * i**1.5 for i in range(20)]
LATENT = {"clip_sample": False, "beta_schedule": "scaled_linear"}


def pixel_pipeline(folder: Path, scheduler: Any) -> UNet2DModel:
    torch.manual_seed(0)
    network = randomised(UNet2DModel(**BASE)).eval()
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    return network


def latent_pipeline(folder: Path, scheduler: Any) -> UNet2DModel:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vq = VQModel(block_out_channels=(32, 64), latent_channels=3, num_vq_embeddings=8, scaling_factor=1.0, **kinds)
    network = randomised(UNet2DModel(**BASE)).eval()
    LDMPipeline(vq, network, scheduler).save_pretrained(folder)
    return network


@torch.no_grad()
def by_ddim(model: DiffusionModel, network: UNet2DModel, scheduler: DDIMScheduler, steps: int) -> float:
    """Largest difference of two samples from the library's, in units of their size."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    ours = last(ddim(model.schedule, model.predict, noise, lambda: noise, steps))
    return ((x - ours).abs().max() / x.abs().max()).item()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"trained_betas": BETAS},
        {"prediction_type": "v_prediction"},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_pixel_samples_equal_the_library_s(keys: dict[str, Any], tmp_path: Path) -> None:
    scheduler = DDIMScheduler(**SHORT, **keys)
    network = pixel_pipeline(tmp_path, scheduler)
    assert by_ddim(load_model(tmp_path), network, scheduler, 5) < 1e-5


@pytest.mark.parametrize("keys", [{}, {"set_alpha_to_one": False, "steps_offset": 1}])
def test_latent_samples_equal_the_library_s(keys: dict[str, Any], tmp_path: Path) -> None:
    """Absent keys mean a DDIM that ends at x_0; CompVis's samples end at abar_0."""
    scheduler = DDIMScheduler(**SHORT, **LATENT, **keys)
    network = latent_pipeline(tmp_path / "in", scheduler)
    model = load_model(tmp_path / "in")
    assert by_ddim(model, network, scheduler, 5) < 1e-5
    model.save(tmp_path / "out", "diffusers")
    assert load_model(tmp_path / "out").diffusion == model.diffusion


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ancestral_samples_have_the_scheduler_s_variance(
    variance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(**SHORT, variance_type=variance)
    network = pixel_pipeline(tmp_path / "in", scheduler)
    model = load_model(tmp_path / "in")
    draws = torch.randn(21, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    used = iter(draws[1:])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(used))
    scheduler.set_timesteps(20)
    x = draws[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    ours_used = iter(draws[1:])
    ours = last(ddpm(model.schedule, model.predict, draws[0], lambda: next(ours_used)))
    assert (x - ours).abs().max() < 1e-5 * x.abs().max()
    model.save(tmp_path / "out", "diffusers")
    assert load_model(tmp_path / "out").schedule.variance == model.schedule.variance
    model.save(tmp_path / "folder")
    assert load_model(tmp_path / "folder").schedule.variance == model.schedule.variance


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CMStochasticIterativeScheduler",
        "ScoreSdeVeScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "IPNDMScheduler",
        "UnCLIPScheduler",
        "CogVideoXDDIMScheduler",
    ],
)
def test_schedulers_of_other_processes_are_refused_by_name(name: str, tmp_path: Path) -> None:
    pixel_pipeline(tmp_path, getattr(diffusers, name)())
    refused(tmp_path, f"scheduler_config.json: {name} is another process")


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("pipeline", [pixel_pipeline, latent_pipeline])
def test_solvers_of_the_same_process_are_read(name: str, pipeline: Any, tmp_path: Path) -> None:
    scheduler = getattr(diffusers, name)(**SHORT)
    pipeline(tmp_path, scheduler)
    schedule = load_model(tmp_path).schedule
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**{**SHORT, "beta_schedule": "sigmoid"}),
        DDPMScheduler(**{**SHORT, "beta_schedule": "laplace"}),
        diffusers.HeunDiscreteScheduler(**{**SHORT, "beta_schedule": "exp"}),
    ],
)
def test_a_schedule_without_a_name_here_is_read_by_its_betas(scheduler: Any, tmp_path: Path) -> None:
    pixel_pipeline(tmp_path / "theirs", scheduler)
    model = load_model(tmp_path / "theirs")
    torch.testing.assert_close(model.schedule.betas, scheduler.betas.double(), rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "ours")
    assert load_model(tmp_path / "ours").diffusion == model.diffusion


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (DDPMScheduler(variance_type="learned_range"), "variance_type: 'learned_range'"),
        (DDPMScheduler(variance_type="learned"), "variance_type: 'learned'"),
        (DDPMScheduler(variance_type="fixed_large_log"), "variance_type: 'fixed_large_log'"),
        (DDPMScheduler(trained_betas=BETAS), "num_train_timesteps: 1000"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", sigma_max=5.0), "timestep_type: 'continuous'"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas: True"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type"),
    ],
)
def test_a_key_that_changes_the_meaning_is_refused_by_name(scheduler: Any, words: str, tmp_path: Path) -> None:
    pixel_pipeline(tmp_path, scheduler)
    refused(tmp_path, f"scheduler_config.json: {words}")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_train_timesteps": 20.0}, "num_train_timesteps: expected a whole number, got 20.0"),
        ({"beta_schedule": "exotic"}, "beta_schedule: 'exotic' is not one of"),
        ({"beta_schedule": "sigmoid", "num_train_timesteps": "20"}, "num_train_timesteps: expected a whole number"),
        ({"trained_betas": [2.0]}, "trained_betas: expected numbers"),
        ({"variance_type": ["a"]}, "variance_type: ['a'] is not one of"),
        ({"beta_start": 0.5}, "beta_start, beta_end: must satisfy 0 < beta_start <= beta_end"),
    ],
)
def test_a_bad_value_is_named_once_by_the_files_own_key(
    keys: dict[str, Any], words: str, tmp_path: Path, capsys
) -> None:
    pixel_pipeline(tmp_path, DDPMScheduler(**SHORT))
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    assert run_script("inspect_checkpoint.py", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: {words}") and line.count("scheduler_config.json") == 1
    refused(tmp_path, f"{path}: {words}")


def test_an_unknown_key_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixel_pipeline(tmp_path, DDPMScheduler(**SHORT))
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "zeta": 1}))
    load_model(tmp_path)
    assert "scheduler_config.json: zeta: not a key" in caplog.text


def test_a_section_without_the_sampling_keys_does_not_contradict_them(tmp_path: Path) -> None:
    pixel_pipeline(tmp_path, DDPMScheduler(**SHORT, variance_type="fixed_large"))
    section = DiffusionConfig("linear", 20, 0.01, 0.4, "pixel")
    teacher = TeacherConfig(str(tmp_path))
    model = open_model(tmp_path, Hints.of_sections(teacher, section, FirstStageConfig()))
    assert model.schedule.variance == "beta"


def refused(folder: Path, words: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
