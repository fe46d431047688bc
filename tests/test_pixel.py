"""Pixel space: learned variance, clipping and the hybrid objective, against closed forms and diffusers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ldm_dkdm import DiffusionModel, NoiseSchedule
from ldm_dkdm.diffusion.objectives import gaussian_kl, pixel_log_likelihood, vlb_loss
from ldm_dkdm.diffusion.process import learned_log_variance, posterior, reverse_step
from ldm_dkdm.diffusion.samplers import Denoise, ddpm, dpm_solver
from ldm_dkdm.diffusion.schedule import betas_of
from ldm_dkdm.diffusion.timesteps import respaced_timesteps, solver_timesteps
from ldm_dkdm.pixel import PixelCodec
from ldm_dkdm.records import Prediction
from tests.analytic import GaussianNetwork

SCHEDULE = NoiseSchedule("cosine")
SHAPE = (2, 3, 4, 4)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    """eps and a variance fraction, both from -1 to 1."""
    return torch.cat([torch.sin(3 * x + t.view(-1, 1, 1, 1) / 100), torch.cos(5 * x)], 1)


class Calls(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.function(x, t, label)


def model_of(function: Callable[..., Tensor], schedule: NoiseSchedule, **options: object) -> DiffusionModel:
    return DiffusionModel(Calls(function), schedule=schedule, shape=SHAPE[1:], **{"space": "pixel", **options})


def in_float64(model: DiffusionModel) -> Denoise:
    """A model's predictions in float64; called by itself it predicts in float32."""
    return lambda x, t, label=None: model.read(model.network(x, t, label), x, t)


DENOISE = in_float64(model_of(network, SCHEDULE))


@pytest.mark.parametrize("step", [0, 1, 2, 57, 500, 998, 999])
def test_a_reverse_step_with_learned_variance_equals_diffusers(step: int) -> None:
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=True, clip_sample_range=1.0
    )
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), SCHEDULE.alphas_cumprod, rtol=1e-4, atol=1e-7)
    scheduler.alphas_cumprod, scheduler.betas = SCHEDULE.alphas_cumprod, SCHEDULE.betas
    x, t = randn(1), torch.full((2,), step)
    theirs = scheduler.step(network(x, t), step, x, generator=torch.Generator().manual_seed(5)).prev_sample
    torch.testing.assert_close(reverse_step(SCHEDULE, x, t, DENOISE(x, t), randn(5)), theirs, **EXACT)


def test_the_clipped_x0_steers_the_chain_but_eps_stays_what_the_network_said() -> None:
    x, t = 5 * randn(2), torch.tensor([10, 900])
    prediction = DENOISE(x, t)
    assert prediction.x_0.abs().max() == 1
    assert torch.equal(prediction.eps, network(x, t)[:, :3])
    assert torch.equal(prediction.var_fraction, network(x, t)[:, 3:])


def test_a_network_of_fixed_variance_has_no_fraction() -> None:
    prediction = model_of(lambda x, t, label: x, SCHEDULE)(randn(3), torch.tensor([1, 2]))
    assert prediction.var_fraction is None


@pytest.mark.parametrize("step", [1, 300, 999])
def test_the_learned_variance_goes_from_the_posteriors_to_beta(step: int) -> None:
    t = torch.full((2,), step)
    _, posterior_variance = posterior(SCHEDULE, randn(1), randn(2), t, t - 1)
    for fraction, expected in ((-1.0, posterior_variance[0].item()), (1.0, SCHEDULE.betas[step].item())):
        found = learned_log_variance(SCHEDULE, t, t - 1, torch.full(SHAPE, fraction, dtype=torch.float64)).exp()
        torch.testing.assert_close(found, torch.full_like(found, expected), **EXACT)


def test_at_t_0_the_posteriors_variance_is_that_of_t_1() -> None:
    fraction = torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    at = [learned_log_variance(SCHEDULE, torch.tensor([t]), torch.tensor([t - 1]), fraction) for t in (0, 1)]
    torch.testing.assert_close(at[0], at[1], **EXACT)


def test_kl_is_that_of_torch_distributions() -> None:
    mean_p, mean_q, log_var_p, log_var_q = (randn(seed) for seed in range(4))
    expected = kl_divergence(Normal(mean_p, (log_var_p / 2).exp()), Normal(mean_q, (log_var_q / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean_p, log_var_p, mean_q, log_var_q), expected, **EXACT)


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_vlb_is_the_kl_of_the_two_reverse_steps_in_bits(step: int, clips: bool) -> None:
    x, t = randn(1), torch.full((2,), step)
    target, prediction = (Prediction(randn(s), randn(s + 1).clamp(-1, 1), randn(s + 2).tanh()) for s in (10, 20))
    abar = SCHEDULE.alphas_cumprod[step]  # the public code's x_0 is what eps means, unclipped
    own = prediction.x_0 if clips else (x - (1 - abar).sqrt() * prediction.eps) / abar.sqrt()
    means = [posterior(SCHEDULE, x_0, x, t, t - 1)[0] for x_0 in (target.x_0, own)]
    stds = [(learned_log_variance(SCHEDULE, t, t - 1, p.var_fraction) / 2).exp() for p in (target, prediction)]
    expected = kl_divergence(Normal(means[0], stds[0]), Normal(means[1], stds[1])).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(vlb_loss(SCHEDULE, x, t, target, prediction, clips), expected, **EXACT)
    if clips:  # only then a student equal to its teacher has no loss
        torch.testing.assert_close(vlb_loss(SCHEDULE, x, t, target, target, clips), torch.zeros_like(expected), **EXACT)


def test_vlb_trains_the_variance_only() -> None:
    eps, fraction = randn(1).requires_grad_(), randn(2).requires_grad_()
    student = model_of(lambda x, t, label: torch.cat([eps, fraction], 1), SCHEDULE)
    x, t = randn(3), torch.tensor([5, 600])
    vlb_loss(SCHEDULE, x, t, DENOISE(x, t), student(x, t)).sum().backward()
    assert eps.grad is None or eps.grad.abs().max() == 0
    assert fraction.grad.abs().min() > 0


def test_a_target_from_data_is_the_posterior_and_at_0_the_likelihood_of_its_pixels() -> None:
    x_0 = torch.randint(0, 256, SHAPE).double() / 127.5 - 1
    x, t = randn(1), torch.tensor([0, 700])
    prediction = Prediction(randn(2), randn(3).clamp(-1, 1), randn(4).tanh())
    as_posterior = Prediction(randn(5), x_0, torch.full(SHAPE, -1.0, dtype=torch.float64))
    found = vlb_loss(SCHEDULE, x, t, Prediction(randn(5), x_0), prediction, True)
    torch.testing.assert_close(found[1], vlb_loss(SCHEDULE, x, t, as_posterior, prediction, True)[1], **EXACT)
    mean, _ = posterior(SCHEDULE, prediction.x_0, x, t, t - 1)
    likelihood = pixel_log_likelihood(x_0, mean, learned_log_variance(SCHEDULE, t, t - 1, prediction.var_fraction))
    torch.testing.assert_close(found[0], -likelihood[0].mean() / math.log(2), **EXACT)


def test_the_likelihoods_of_all_256_values_add_up_to_one() -> None:
    values = (torch.arange(256).double() / 127.5 - 1).view(-1, 1, 1, 1)
    for numbers in ((0.3, -4.0), (0.97, -5.0), (-2.0, 0.5)):
        mean, log_variance = (torch.full_like(values, number) for number in numbers)
        assert pixel_log_likelihood(values, mean, log_variance).exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_respaced_sampling_is_sampling_of_the_respaced_process(steps: int) -> None:
    timesteps = respaced_timesteps(1000, steps)
    assert (len(timesteps), timesteps[0], timesteps[-1]) == (steps, 0, 999)
    short = NoiseSchedule(betas=betas_of(SCHEDULE.alphas_cumprod[timesteps]))
    of_short = in_float64(model_of(lambda x, t, label: network(x, torch.tensor(timesteps)[t]), short))
    noises = randn(7, steps, *SHAPE)
    ours = list(ddpm(SCHEDULE, DENOISE, randn(8), iter(noises).__next__, steps))
    for state, expected in zip(ours, ddpm(short, of_short, randn(8), iter(noises).__next__), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-6)


def test_respaced_ddpm_equals_diffusers_where_the_variance_is_fixed() -> None:
    schedule = NoiseSchedule()
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        timestep_spacing="linspace",
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == respaced_timesteps(1000, 50)[::-1]

    denoise = in_float64(model_of(lambda x, t, label: network(x, t)[:, :3], schedule, space="latent"))
    x, seeds = randn(1), iter(range(50))
    ours = ddpm(schedule, denoise, x, lambda: randn(next(seeds)), 50)
    for seed, (state, step) in enumerate(zip(ours, scheduler.timesteps.tolist(), strict=True)):
        eps = network(x, torch.full((2,), step))[:, :3]
        x = scheduler.step(eps, step, x, generator=torch.Generator().manual_seed(seed)).prev_sample
        torch.testing.assert_close(state, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
def test_dpm_solver_equals_diffusers_state_by_state(parameterization: str, steps: int, name: str) -> None:
    schedule = NoiseSchedule(name)
    betas = {"scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[name]
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule=betas,
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[parameterization],
        timestep_spacing="linspace",
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == solver_timesteps(1000, steps)[::-1]

    def output(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return torch.sin(2 * x + t.view(-1, 1, 1, 1) / 300)

    denoise = in_float64(model_of(output, schedule, space="latent", parameterization=parameterization))
    x = randn(1)
    ours = dpm_solver(schedule, denoise, x, iter(()).__next__, steps)  # it draws no noise
    for state, step in zip(ours, scheduler.timesteps, strict=True):
        x = scheduler.step(output(x, step.repeat(2)), step, x).prev_sample
        torch.testing.assert_close(state, x, rtol=2e-3, atol=2e-3)  # theirs are float32 sigmas; eps is divided by 5e-5


@pytest.mark.parametrize("steps", range(1, 41))
def test_solver_timesteps_rise_to_the_last_for_every_number_of_steps(steps: int) -> None:
    timesteps = solver_timesteps(40, steps)
    assert timesteps == sorted(set(timesteps)) and len(timesteps) == steps and timesteps[-1] == 39


def _solver_error(steps: int) -> float:
    """Largest error before the last step, which is of first order whatever comes before it."""
    schedule = NoiseSchedule()
    gaussian = GaussianNetwork(schedule, mean=0.7, std=0.4)
    z = torch.tensor([-1.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    start_mean, start_std = gaussian.moments(999)
    model = DiffusionModel(gaussian, schedule=schedule, shape=(1, 1, 1))
    states = list(dpm_solver(schedule, model, start_mean + start_std * z, lambda: z, steps))
    mean, std = gaussian.moments(solver_timesteps(1000, steps)[0])
    return (states[-2] - (mean + std * z)).abs().max().item()


def test_dpm_solver_transports_a_gaussian_with_second_order() -> None:
    assert _solver_error(20) < 0.003
    assert _solver_error(20) < 0.35 * _solver_error(10)


def test_pixels_go_to_states_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    states = PixelCodec().encode(images)
    assert (states.min(), states.max()) == (-1, 1)
    assert torch.equal(PixelCodec().decode(states), images)
