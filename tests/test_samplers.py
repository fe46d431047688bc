"""Samplers against diffusers (1e-10 in float64) and against data whose denoiser is known."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.diffusion.process import eps_to_x0, reverse_step
from ldm_dkdm.diffusion.samplers import ddim, ddpm, last
from ldm_dkdm.diffusion.timesteps import ddim_timesteps
from ldm_dkdm.records import Prediction
from tests.analytic import GaussianNetwork

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
SCHEDULE = NoiseSchedule()
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
DDIM = {**BETAS, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}


def nonlinear(x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
    eps = torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100)
    return Prediction(eps, eps_to_x0(SCHEDULE, x, t, eps))


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _exact(scheduler: DDIMScheduler | DDPMScheduler) -> DDIMScheduler | DDPMScheduler:
    """Check diffusers' float32 schedule, then give it our float64 one."""
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), SCHEDULE.alphas_cumprod, rtol=1e-4, atol=1e-6)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    if not scheduler.config.get("set_alpha_to_one"):
        scheduler.final_alpha_cumprod = SCHEDULE.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize("step", [0, 1, 2, 57, 500, 998, 999])
def test_reverse_step_equals_diffusers_ddpm(step: int) -> None:
    scheduler = _exact(DDPMScheduler(**BETAS, variance_type="fixed_small"))
    x, t = _randn(1, 2, 3, 4, 4), torch.full((2,), step)
    prediction = nonlinear(x, t)
    theirs = scheduler.step(prediction.eps, step, x, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(reverse_step(SCHEDULE, x, t, prediction, _randn(5, 2, 3, 4, 4)), theirs, **TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [8, 50])
@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_equals_diffusers_state_by_state(eta: float, steps: int, offset: int) -> None:
    scheduler = _exact(DDIMScheduler(**DDIM | {"set_alpha_to_one": offset == 0, "steps_offset": offset}))
    scheduler.set_timesteps(steps)
    x = _randn(2, 2, 3, 4, 4)
    noises = _randn(3, steps, 2, 3, 4, 4)
    ours = list(ddim(NoiseSchedule(steps_offset=offset), nonlinear, x, iter(noises).__next__, steps, eta=eta))
    assert len(ours) == steps
    for state, step, noise in zip(ours, scheduler.timesteps.tolist(), noises, strict=True):
        eps = nonlinear(x, torch.full((2,), step)).eps
        x = scheduler.step(eps, step, x, eta=eta, variance_noise=noise if eta else None).prev_sample
        torch.testing.assert_close(state, x, **TOLERANCE)


def test_ddim_timesteps_are_those_of_compvis() -> None:
    assert ddim_timesteps(1000, 200) == [t + 1 for t in range(0, 1000, 5)]
    assert ddim_timesteps(1000, 4) == [1, 251, 501, 751]
    assert ddim_timesteps(1000, 4, offset=0) == [0, 250, 500, 750]
    assert ddim_timesteps(1000, 1000) == list(range(1000))


def test_ddim_timesteps_rise_within_the_schedule_for_every_number_of_steps() -> None:
    runs = {steps: ddim_timesteps(1000, steps) for steps in range(1, 1001)}
    assert [steps for steps, run in runs.items() if run != sorted(set(run)) or run[0] < 0] == []
    assert [steps for steps, run in runs.items() if run[-1] > 999] == []


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match=rf"^steps: {steps} .*1000"):
        ddim_timesteps(1000, steps)


def _ddim_error(steps: int) -> float:
    """Largest error of mean and std: DDIM maps the Gaussian x_T affinely, so three points tell them exactly."""
    network = GaussianNetwork(SCHEDULE, mean=0.7, std=0.4)
    z = torch.tensor([-1.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    (start_mean, start_std), (mean, std) = network.moments(999), network.moments(0)
    model = DiffusionModel(network, schedule=SCHEDULE, shape=(1, 1, 1))
    x_0 = last(ddim(SCHEDULE, model, start_mean + start_std * z, lambda: z, steps))
    return (x_0 - (mean + std * z)).abs().max().item()


def test_ddim_transports_a_gaussian_and_converges() -> None:
    assert _ddim_error(500) < 0.01
    assert _ddim_error(500) < 0.5 * _ddim_error(100)


def test_ddpm_samples_a_gaussian() -> None:
    network = GaussianNetwork(SCHEDULE, mean=0.7, std=0.4)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(1024, 1, 4, 4, generator=generator)

    x_0 = last(ddpm(SCHEDULE, DiffusionModel(network, schedule=SCHEDULE, shape=(1, 4, 4)), noise(), noise))
    assert network.calls == 1000
    assert x_0.mean().item() == pytest.approx(0.7, abs=0.015)
    assert x_0.std().item() == pytest.approx(0.4, rel=0.03)


SHORT = NoiseSchedule(num_timesteps=10)


class Nonlinear(nn.Module):
    """A network of no meaning that mixes x and t."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100)


def _states(first_stage: Path, **options: object) -> Tensor:
    model = DiffusionModel(Nonlinear(), schedule=SHORT, shape=(3, 8, 8), first_stage=first_stage)
    config = SamplingConfig(**{"steps": 5, **options})
    return torch.cat([batch.states for batch in model.sample_batches(config)])


@pytest.mark.parametrize("options", [{"eta": 0.7}, {"sampler": "ddpm", "steps": 10}, {"sampler": "dpm-solver++"}])
def test_image_i_depends_on_seed_plus_i_only(options: dict[str, object], first_stage: Path) -> None:
    whole = _states(first_stage, count=5, batch_size=5, seed=3, **options)
    assert torch.equal(whole, _states(first_stage, count=5, batch_size=2, seed=3, **options))
    assert torch.equal(whole[2:], _states(first_stage, count=3, batch_size=1, seed=5, **options))
    assert not torch.equal(whole[0], whole[1])
