"""Schedules and one-step formulas against closed forms, in float64."""

import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.checkpoints import compvis
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.pools import other_facts
from ldm_dkdm.config.load import load_config, to_yaml
from ldm_dkdm.config.schema import DiffusionConfig, DiffusionRun
from ldm_dkdm.diffusion.process import (
    eps_to_x0,
    posterior,
    q_sample,
    reverse_step,
    v_to_eps,
    v_to_x0,
    x0_to_eps,
)
from ldm_dkdm.diffusion.schedule import beta_ends
from ldm_dkdm.distillation.make_student import require_fit
from ldm_dkdm.networks import UNet
from ldm_dkdm.records import Prediction
from tests.parts import UNET_PARAMS

SCHEDULES = [NoiseSchedule(name) for name in ("scaled_linear", "linear", "cosine")]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
TIMES = torch.tensor([0, 1, 17, 500, 998, 999])


def _normal(seed: int) -> Tensor:
    return torch.randn(len(TIMES), 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _cosine_beta(i: int) -> float:
    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(0.999, 1 - abar((i + 1) / 1000) / abar(i / 1000))


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("scaled_linear", np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2),
        ("linear", np.linspace(0.0001, 0.02, 1000)),
        ("cosine", np.array([_cosine_beta(i) for i in range(1000)])),
    ],
)
def test_betas_are_the_closed_form(name: str, betas: np.ndarray) -> None:
    schedule = NoiseSchedule(name)
    np.testing.assert_allclose(schedule.betas.numpy(), betas, rtol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-11)


def test_the_cosine_schedule_is_capped_at_its_end() -> None:
    assert NoiseSchedule("cosine").betas[-1].item() == 0.999


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("schedule", {"name": "sigmoid"}),
        ("num_timesteps", {"num_timesteps": 0}),
        ("beta_start, beta_end", {"beta_start": 0.02, "beta_end": 0.01}),
        ("beta_start, beta_end", {"beta_start": 0.0}),
        ("beta_start, beta_end", {"beta_end": 1.0}),
    ],
)
def test_impossible_schedules_are_refused(key: str, arguments: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        NoiseSchedule(**arguments)


@every_schedule
def test_eps_x0_and_v_describe_one_state(schedule: NoiseSchedule) -> None:
    x_0, eps = _normal(1), _normal(2)
    x_t = q_sample(schedule, x_0, TIMES, eps)
    abar = schedule.alphas_cumprod[TIMES].view(-1, 1, 1, 1)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x_0
    _close(x_t, abar.sqrt() * x_0 + (1 - abar).sqrt() * eps)
    _close(v_to_eps(schedule, x_t, TIMES, v), eps)
    _close(v_to_x0(schedule, x_t, TIMES, v), x_0)
    _close(x0_to_eps(schedule, x_t, TIMES, x_0), eps)


@every_schedule
def test_round_trips_return_what_went_in(schedule: NoiseSchedule) -> None:
    x_t, eps = _normal(3), _normal(4)
    _close(x0_to_eps(schedule, x_t, TIMES, eps_to_x0(schedule, x_t, TIMES, eps)), eps)


@every_schedule
def test_posterior_is_the_textbook_one_at_stride_1(schedule: NoiseSchedule) -> None:
    x_0, x_t = _normal(5), _normal(6)
    beta = schedule.betas[TIMES].view(-1, 1, 1, 1)
    abar = schedule.alphas_cumprod[TIMES].view(-1, 1, 1, 1)
    before = abar / (1 - beta)  # abar_{t-1}, also at t = 0
    mean, variance = posterior(schedule, x_0, x_t, TIMES, TIMES - 1)
    expected = before.sqrt() * beta / (1 - abar) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t
    _close(mean, expected)
    _close(variance, (1 - before) / (1 - abar) * beta)


@settings(deadline=None, max_examples=60)
@given(schedule=st.sampled_from(SCHEDULES), times=st.lists(st.integers(-1, 999), min_size=2, max_size=2, unique=True))
def test_a_jump_of_any_stride_lands_on_the_marginal(schedule: NoiseSchedule, times: list[int]) -> None:
    t_next, t = (torch.tensor([time]) for time in sorted(times))
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    to_x0, variance = posterior(schedule, one, zero, t, t_next)
    to_xt, _ = posterior(schedule, zero, one, t, t_next)
    abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = schedule.alphas_cumprod[t_next].view(-1, 1, 1, 1) if t_next >= 0 else one
    _close(to_x0 + to_xt * abar.sqrt(), target.sqrt())
    _close(variance + to_xt**2 * (1 - abar), 1 - target)


@pytest.mark.parametrize("stride", [1, 7, 1000])
def test_reverse_step_is_a_draw_from_the_posterior(stride: int) -> None:
    schedule, x_t, eps, noise = SCHEDULES[0], _normal(7), _normal(8), _normal(9)
    x_0 = eps_to_x0(schedule, x_t, TIMES, eps)
    mean, variance = posterior(schedule, x_0, x_t, TIMES, (TIMES - stride).clamp(min=-1))
    if stride > 1:  # and what the prediction leaves open of x_0 (Analytic-DPM), none where x_0 is reached
        abar, after = schedule.alpha_bar(TIMES, x_t), schedule.alpha_bar((TIMES - stride).clamp(min=-1), x_t)
        unknown = ((1 / abar - 1) * (1 - eps.square().mean((1, 2, 3), keepdim=True))).clamp(0, 1)
        weight = after.sqrt() * (1 - abar / after) / (1 - abar)
        variance = variance + torch.where((stride <= TIMES).view(-1, 1, 1, 1), weight**2 * unknown, 0.0)
    prediction = Prediction(eps, x_0)
    _close(reverse_step(schedule, x_t, TIMES, prediction, noise, stride), mean + variance.sqrt() * noise)


@every_schedule
def test_a_step_past_zero_ends_at_x0_exactly(schedule: NoiseSchedule) -> None:
    x_t, eps, t = _normal(10).float(), _normal(11).float(), TIMES.clamp(max=4)
    prediction = Prediction(eps, eps_to_x0(schedule, x_t, t, eps))
    arrived = reverse_step(schedule, x_t, t, prediction, _normal(12).float(), stride=5)
    assert torch.equal(arrived, prediction.x_0)


def test_float32_states_get_float64_coefficients() -> None:
    schedule, x_t, x_0, noise = SCHEDULES[0], _normal(13), _normal(14), _normal(15)
    single = Prediction(x_0.float(), x_0.float())
    arrived = reverse_step(schedule, x_t.float(), TIMES, single, noise.float())
    assert arrived.dtype == torch.float32
    _close(arrived.double(), reverse_step(schedule, x_t, TIMES, Prediction(x_0, x_0), noise), 1e-5)


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_linear_betas_are_guided_diffusions(steps: int) -> None:
    scale = 1000 / steps  # get_named_beta_schedule
    expected = np.linspace(scale * 0.0001, scale * 0.02, steps)
    np.testing.assert_allclose(NoiseSchedule("linear", steps).betas.numpy(), expected, rtol=1e-12)
    config = DiffusionConfig("linear", steps)
    assert schedule_of(config).betas.equal(NoiseSchedule("linear", steps).betas)
    assert (config.beta_start, config.beta_end) == beta_ends("linear", steps) == (expected[0], expected[-1])
    assert DiffusionConfig("linear", steps, 0.001, 0.01).beta_end == 0.01


def test_linear_betas_are_diffusers_at_a_thousand_steps() -> None:
    torch.testing.assert_close(NoiseSchedule("linear").betas.float(), DDPMScheduler().betas, rtol=1e-6, atol=0)


def training(folder: Path, diffusion: str, params: str = "{}") -> Path:
    """A config of a training with this section."""
    file = folder / "base.yaml"
    file.write_text(
        f"model: {{target: x, params: {params}}}\ntrainer: {{max_steps: 1, learning_rate: 1}}\n"
        f"data: {{path: x, image_size: 8, batch_size: 1}}\ndiffusion: {diffusion}\n"
    )
    return file


def test_ends_belong_to_their_schedule(tmp_path: Path) -> None:
    file = training(tmp_path, "{schedule: scaled_linear, beta_start: 0.0015, beta_end: 0.0195}")
    changed = load_config(file, ["diffusion.schedule=linear"], DiffusionRun).diffusion
    assert (changed.beta_start, changed.beta_end) == (0.0001, 0.02)
    kept = load_config(file, ["diffusion.schedule=scaled_linear", "diffusion.beta_end=0.01"], DiffusionRun).diffusion
    assert (kept.beta_start, kept.beta_end) == (0.0015, 0.01)


def test_default_ends_stay_below_one_for_few_timesteps_and_given_ones_are_refused() -> None:
    assert NoiseSchedule("linear", 12).beta_end == DiffusionConfig("linear", 12).beta_end == 0.999
    with pytest.raises(UserError, match=r"beta_start, beta_end: must satisfy"):
        NoiseSchedule("linear", 12, beta_end=1.5)


IDLE: list[tuple[str, dict[str, Any], str]] = [  # a key, what it is given with, and why it has no effect
    ("num_timesteps", {"num_timesteps": 1000, "betas": [0.1, 0.2, 0.3]}, "1000 is not the number of betas, which is 3"),
    ("schedule", {"schedule": "linear", "betas": [0.1, 0.2, 0.3]}, "has no effect beside betas"),
    ("beta_start", {"schedule": "cosine", "beta_start": 0.3}, "has no effect with schedule: cosine"),
    ("beta_end", {"schedule": "cosine", "beta_end": 7}, "has no effect with schedule: cosine"),
    (
        "clip_sample_range",
        {"schedule": "linear", "space": "pixel", "clip_sample": False, "clip_sample_range": 2},
        "has no effect without clip_sample: true",
    ),
    (
        "sample_max_value",
        {"schedule": "linear", "space": "pixel", "sample_max_value": 3},
        "has no effect without thresholding: true",
    ),
    (
        "clip_sample",
        {"schedule": "linear", "thresholding": True, "clip_sample": True},
        "has no effect with thresholding: true",
    ),
    (
        "clip_sample_range",
        {"schedule": "linear", "thresholding": True, "clip_sample_range": 2},
        "has no effect with thresholding: true",
    ),
]
HINTS: dict[str, Any] = {"image_size": 8, "num_head_channels": 32, "use_new_attention_order": False}


@pytest.mark.parametrize(("key", "keys", "why"), IDLE)
def test_a_key_without_effect_beside_another_is_refused(
    key: str, keys: dict[str, Any], why: str, tmp_path: Path
) -> None:
    torch.save(UNet(**UNET_PARAMS).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"{key}: {why}; leave it out"):
        load_model(tmp_path / "a.pt", **{**HINTS, "space": "pixel", **keys})
    file = training(tmp_path, str(keys))
    with pytest.raises(UserError, match=f"^diffusion.{key}: {why}; remove it"):
        load_config(file, schema=DiffusionRun)
    assert load_config(file, schema=DiffusionRun, of_run=True)  # a run of an older version goes on


@pytest.mark.parametrize("keys", [{}, {"schedule": "cosine"}, {"schedule": "linear", "num_timesteps": 4000}])
def test_the_config_of_a_run_is_a_base_of_another(keys: dict[str, Any], tmp_path: Path) -> None:
    first = load_config(training(tmp_path, str(keys)), schema=DiffusionRun)
    (tmp_path / "again.yaml").write_text(to_yaml(first))
    assert load_config(tmp_path / "again.yaml", schema=DiffusionRun) == first
    betas = load_config(
        tmp_path / "again.yaml", ["diffusion.betas=[0.1,0.2]"], DiffusionRun
    )  # in place of the schedule
    (tmp_path / "betas.yaml").write_text(to_yaml(betas))
    assert load_config(tmp_path / "betas.yaml", schema=DiffusionRun) == betas and betas.diffusion.num_timesteps == 2


def test_a_variance_beside_a_learned_one_and_heads_beside_their_width_are_refused(tmp_path: Path, caplog) -> None:
    torch.save(UNet(**{**UNET_PARAMS, "out_channels": 6}).state_dict(), tmp_path / "a.pt")
    for hint, message in (
        ({"variance": "beta"}, "variance: has no effect, since the network predicts its own; leave it out"),
        ({"num_heads": 3}, "num_heads: has no effect beside num_head_channels; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "a.pt", **HINTS, space="pixel", schedule="cosine", **hint)
    with caplog.at_level(logging.WARNING):
        load_config(training(tmp_path, "{}", "{num_heads: 3, num_head_channels: 32}"), schema=DiffusionRun)
    assert "model.params.num_heads: has no effect beside num_head_channels" in caplog.text


def test_unused_ends_do_not_tell_two_cosine_processes_apart() -> None:
    """CompVis's checkpoints store betas, whose ends older model folders and pools hold."""
    ends = {"beta_start": 4.128e-05, "beta_end": 0.999}
    old, new = DiffusionConfig("cosine", 1000, **ends), DiffusionConfig("cosine", 1000)
    assert old == new
    named = compvis.name_schedule(NoiseSchedule("cosine").alphas_cumprod)
    teacher = DiffusionModel(UNet(**UNET_PARAMS), schedule=schedule_of(named)).changed(diffusion=named)
    for student in (
        DiffusionModel(UNet(**UNET_PARAMS), schedule=teacher.schedule),
        DiffusionModel(UNet(**UNET_PARAMS), like=teacher, schedule=teacher.schedule),
        teacher.changed(schedule=teacher.schedule, network=UNet(**UNET_PARAMS)),
    ):
        assert student.diffusion == teacher.diffusion
        require_fit(student, teacher)
    header = {"diffusion": {**asdict(new), **ends}}
    assert not list(other_facts(header, {"diffusion": asdict(new)}))
