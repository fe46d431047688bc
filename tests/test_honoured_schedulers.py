"""Keys of diffusers' schedulers that change sampling: the library's states, kept wherever a model goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.diffusion.samplers import ddim, ddpm, dpm_solver, last
from ldm_dkdm.diffusion.timesteps import SPACINGS, of_ddim, of_ddpm, of_solver
from tests.test_diffusers_scheduler import LATENT, SHORT, by_ddim, latent_pipeline, pixel_pipeline

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 2.5}
OF_ALL = [
    {"prediction_type": "sample"},
    ZERO,
    {**ZERO, "prediction_type": "sample"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"clip_sample_range": 0.5},
    {"clip_sample_range": 3.0},
    {"clip_sample": False},
    THRESHOLD,
    {"thresholding": True, "sample_max_value": 1.5, "clip_sample": False},
    {"steps_offset": 1},
]
OF_DDIM = [{"set_alpha_to_one": False}, {"set_alpha_to_one": False, "timestep_spacing": "trailing"}]


def assert_kept(model: DiffusionModel, folder: Path) -> None:
    """A saved model, as a folder of this package or of diffusers, samples as before; so does a student."""
    for form in ("diffusers", "folder"):
        model.save(folder / form, form)
        saved = load_model(folder / form)
        assert (saved.diffusion, saved.parameterization) == (model.diffusion, model.parameterization)
    assert DiffusionModel(model.network, like=model).diffusion == model.diffusion
    again = model.changed(schedule=model.schedule)  # set_alpha_to_one and steps_offset follow from the space
    assert again.diffusion.timestep_spacing == model.diffusion.timestep_spacing
    assert again.diffusion.clip_sample == model.diffusion.clip_sample


@pytest.mark.parametrize("keys", [*OF_ALL, *OF_DDIM])
def test_ddim_equals_the_library_s(keys: dict[str, Any], tmp_path: Path) -> None:
    """The library's DDIM steps to t - T // steps, which is the next timestep of these numbers of steps."""
    scheduler = DDIMScheduler(**SHORT, **keys)
    network = pixel_pipeline(tmp_path / "in", scheduler)
    model = load_model(tmp_path / "in")
    steps = 20 if keys.get("timestep_spacing") == "linspace" else 5
    assert by_ddim(model, network, scheduler, steps) < 1e-5
    assert_kept(model, tmp_path)


@pytest.mark.parametrize("keys", [{"clip_sample": True, "clip_sample_range": 2.0}, THRESHOLD, ZERO])
def test_ddim_on_latents_equals_the_library_s(keys: dict[str, Any], tmp_path: Path) -> None:
    scheduler = DDIMScheduler(**SHORT, **{**LATENT, **keys})
    network = latent_pipeline(tmp_path / "in", scheduler)
    model = load_model(tmp_path / "in")
    assert by_ddim(model, network, scheduler, 5) < 1e-5
    model.save(tmp_path / "out", "diffusers")
    assert load_model(tmp_path / "out").diffusion == model.diffusion


@pytest.mark.parametrize(("keys", "steps"), [*((keys, 7) for keys in OF_ALL), (ZERO, 20), (THRESHOLD, 20)])
def test_ancestral_samples_equal_the_library_s(
    keys: dict[str, Any], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = DDPMScheduler(**SHORT, **keys)
    network = pixel_pipeline(tmp_path / "in", scheduler)
    model = load_model(tmp_path / "in")
    draws = torch.randn(steps + 1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    used, ours_used = iter(draws[1:]), iter(draws[1:])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(used))
    scheduler.set_timesteps(steps)
    x = draws[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    ours = last(ddpm(model.schedule, model.predict, draws[0], lambda: next(ours_used), steps))
    assert (x - ours).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("keys", [THRESHOLD, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("steps", [5, 7])
def test_solver_samples_equal_the_library_s(keys: dict[str, Any], steps: int, tmp_path: Path) -> None:
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True, **keys}
    scheduler = DPMSolverMultistepScheduler(**SHORT, **options)
    network = pixel_pipeline(tmp_path, scheduler)
    model = load_model(tmp_path)
    if "thresholding" not in keys:  # this class does not clip
        model = model.changed(diffusion=type(model.diffusion)(**{**vars(model.diffusion), "clip_sample": False}))
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    ours = last(dpm_solver(model.schedule, model.predict, noise, lambda: noise, steps))
    assert (x - ours).abs().max() < 1e-5 * x.abs().max()


@pytest.mark.parametrize("spacing", [*SPACINGS])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_timesteps_are_those_of_the_library(spacing: str, offset: int, kind: Any) -> None:
    schedule = NoiseSchedule(steps_offset=offset, timestep_spacing=spacing)
    timesteps = of_ddim if kind is DDIMScheduler else of_ddpm
    for steps in (2, 3, 7, 10, 25, 30, 50, 61, 200, 333, 499, 750, 998):
        scheduler = kind(timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        theirs = [t for t in scheduler.timesteps.tolist() if t >= 0]  # rounding adds a t = -1 at 61 steps
        below = [min(t, 999) for t in theirs]  # at 998 steps with an offset
        assert timesteps(schedule, steps) == below[::-1]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_solver_s_timesteps_are_those_of_the_library(spacing: str) -> None:
    for steps in (2, 7, 10, 25, 30, 50, 333):
        scheduler = DPMSolverMultistepScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        assert of_solver(NoiseSchedule(timestep_spacing=spacing), steps) == scheduler.timesteps.tolist()[::-1]
    assert of_solver(NoiseSchedule(timestep_spacing="leading"), 10) == of_solver(NoiseSchedule(), 10)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True does not fit prediction_type epsilon"),
        ({"timestep_spacing": "even"}, "timestep_spacing: 'even' is not one of leading, trailing, linspace"),
        ({"steps_offset": 2}, "steps_offset: 2 is not supported, only 0 and 1"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio: must be at most 1"),
        ({"clip_sample_range": -1.0}, "clip_sample_range: must be above 0"),
    ],
)
def test_a_value_without_meaning_is_refused_by_name(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    pixel_pipeline(tmp_path, DDIMScheduler(**SHORT, **keys))
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert f"scheduler_config.json: {words}" in str(error.value) and "\n" not in str(error.value)


def test_clipped_latents_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latent_pipeline(tmp_path, DDIMScheduler(**SHORT, **{**LATENT, "clip_sample": True}))
    load_model(tmp_path)
    assert "clip_sample: true; latents are clipped to +-1 in sampling" in caplog.text


def test_ddim_to_abar_0_leaves_the_last_noise() -> None:
    """With set_alpha_to_one false and timesteps from 0, the last step stays at t = 0."""
    schedule = NoiseSchedule(num_timesteps=10, steps_offset=0, set_alpha_to_one=False)
    model = DiffusionModel(torch.nn.Identity(), schedule=schedule, shape=(1, 2, 2)).changed(schedule=schedule)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)

    def predict(x: torch.Tensor, t: torch.Tensor, label: None) -> Any:
        return model.read(torch.zeros_like(x), x, t)

    states = list(ddim(schedule, predict, x, lambda: x, 5))
    torch.testing.assert_close(states[-1], states[-2], rtol=1e-12, atol=0)
