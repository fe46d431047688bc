"""A process that ends in pure noise (Lin et al. 2023), and networks that predict x_0: closed forms in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoisyPool, UserError, load_model
from ldm_dkdm.config.schema import LossConfig, WarmupConfig
from ldm_dkdm.diffusion.objectives import space_loss, vlb_loss
from ldm_dkdm.diffusion.process import PARAMETERIZATIONS, q_sample, reverse_step
from ldm_dkdm.diffusion.samplers import SAMPLERS, last
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.diffusion.timesteps import log_snr_timesteps
from ldm_dkdm.distillation.make_student import check_loss
from ldm_dkdm.distillation.warmup import Warmup
from ldm_dkdm.evaluation.teacher_check import measure
from ldm_dkdm.networks import UNet
from ldm_dkdm.records import Prediction
from tests.parts import UNET_PARAMS, randomised

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SCHEDULE = NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
MEAN, STD = 0.7, 0.4


class OfGaussian(nn.Module):
    """E[v | x_t] or E[x_0 | x_t] for data N(MEAN, STD^2), elementwise."""

    def __init__(self, kind: str, schedule: NoiseSchedule = SCHEDULE) -> None:
        super().__init__()
        self.kind, self.abar = kind, schedule.alphas_cumprod

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        abar = self.abar[t].view(-1, 1, 1, 1).to(x)
        x_0 = MEAN + abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar) * (x - abar.sqrt() * MEAN)
        return x_0 if self.kind == "x0" else (abar.sqrt() * x - x_0) / (1 - abar).sqrt()


def gaussian(kind: str, side: int = 4) -> DiffusionModel:
    return DiffusionModel(OfGaussian(kind), schedule=SCHEDULE, parameterization=kind, shape=(1, side, side))


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_schedule_is_the_paper_s() -> None:
    plain = NoiseSchedule()
    torch.testing.assert_close(SCHEDULE.betas, rescale_zero_terminal_snr(plain.betas), **EXACT)
    assert SCHEDULE.alphas_cumprod[-1] == 0 and SCHEDULE.ends_in_noise and not plain.ends_in_noise
    torch.testing.assert_close(SCHEDULE.unscaled_betas, plain.betas, **EXACT)
    given = NoiseSchedule(betas=plain.betas, rescale_betas_zero_snr=True)
    torch.testing.assert_close(given.alphas_cumprod, SCHEDULE.alphas_cumprod, **EXACT)
    with pytest.raises(UserError, match=r"^rescale_betas_zero_snr: needs at least 2 timesteps"):
        NoiseSchedule(num_timesteps=1, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("step", [0, 1, 500, 998])
def test_a_network_of_x0_says_the_same_as_one_of_eps_or_v(step: int) -> None:
    schedule, t = NoiseSchedule(), torch.full((2,), step)
    x_0, eps = randn(0, 2, 3, 4, 4), randn(1, 2, 3, 4, 4)
    x, abar = q_sample(schedule, x_0, t, eps), schedule.alphas_cumprod[step]
    outputs = {"eps": eps, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x_0, "x0": x_0}
    assert set(outputs) == set(PARAMETERIZATIONS)
    for kind, output in outputs.items():
        torch.testing.assert_close(PARAMETERIZATIONS[kind].eps(schedule, x, t, output), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(PARAMETERIZATIONS[kind].x_0(schedule, x, t, output), x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_the_first_step_from_pure_noise_forgets_it(kind: str) -> None:
    """q(x_{T-2} | x_{T-1}, x_0) is q(x_{T-2} | x_0) where x_{T-1} is pure noise."""
    t, x, noise = torch.full((2,), 999), randn(0, 2, 1, 4, 4), randn(1, 2, 1, 4, 4)
    prediction = gaussian(kind)(x, t)
    torch.testing.assert_close(prediction.eps.double(), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prediction.x_0, torch.full_like(prediction.x_0, MEAN))
    exact = Prediction(x, torch.full_like(x, MEAN))
    found = reverse_step(SCHEDULE, x, t, exact, noise)
    torch.testing.assert_close(found, q_sample(SCHEDULE, exact.x_0, t - 1, noise), **EXACT)
    assert reverse_step(SCHEDULE, x, t, exact, noise, torch.full((2,), 7)).isfinite().all()


@pytest.mark.parametrize("kind", ["v", "x0"])
@pytest.mark.parametrize(("name", "steps"), [("ddim", 200), ("ddpm", 1000), ("dpm-solver++", 500)])
def test_every_sampler_draws_the_data(kind: str, name: str, steps: int) -> None:
    """From N(0, 1) itself, which is x_{T-1} exactly: mean and spread are those of the data."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(1024, 1, 4, 4, generator=generator)

    x_0 = last(SAMPLERS[name].walk(SCHEDULE, gaussian(kind), noise(), noise, steps))
    assert x_0.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x_0.std().item() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("steps", [25, 200, 250])
def test_ancestral_ddim_takes_the_step_whose_noise_is_the_whole_variance(steps: int) -> None:
    """With these betas 1 - abar_next - sigma^2, 0 at the first step, is negative by rounding."""
    ends = {"beta_start": 0.00085, "beta_end": 0.012}
    schedule = NoiseSchedule(**ends, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    model = DiffusionModel(OfGaussian("v", schedule), schedule=schedule, parameterization="v", shape=(1, 2, 2))
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    first = next(SAMPLERS["ddim"].walk(schedule, model, noise, lambda: noise, steps, eta=1.0))
    t = torch.full((2,), SAMPLERS["ddim"].timesteps(schedule, steps)[-2])
    torch.testing.assert_close(first, q_sample(schedule, torch.full_like(noise, MEAN), t, noise))


@pytest.mark.parametrize("mode", ["ancestral", "harvest", "ddim", "dpm-solver++", "noise"])
def test_every_warm_up_fills_a_pool_of_the_right_spread(mode: str) -> None:
    short = NoiseSchedule(num_timesteps=40, beta_start=0.01, beta_end=0.4, rescale_betas_zero_snr=True)
    teacher = DiffusionModel(OfGaussian("v", short), schedule=short, parameterization="v", shape=(1, 8, 8))
    pool = NoisyPool(1600, (1, 8, 8), torch.float32)
    list(Warmup(pool, teacher, WarmupConfig(mode, steps=40, images=1600, batch_size=400), seed=0).run())
    abar = short.alphas_cumprod[pool.t.long()].float().view(-1, 1, 1, 1)
    z = (pool.x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar).sqrt()
    parts = {"at T-1": pool.t == 39, "low": pool.t < 10, "high": pool.t >= 30}
    for name, part in parts.items() if mode != "noise" else [("at T-1", pool.t == 39)]:
        share = {"at T-1": 1 / 40, "low": 1 / 4, "high": 1 / 4}[name] if mode != "noise" else 1
        assert part.float().mean().item() == pytest.approx(share, rel=0.4 if name == "at T-1" else 0.15)
        assert z[part].mean().item() == pytest.approx(0, abs=0.06)
        assert z[part].std().item() == pytest.approx(1, rel=0.07)


def test_log_snr_timesteps_begin_at_pure_noise() -> None:
    timesteps = log_snr_timesteps(SCHEDULE, 20)
    assert timesteps[-1] == 999 and timesteps[0] == 0 and len(timesteps) >= 15
    assert timesteps == sorted(set(timesteps))


def test_a_loss_in_v_is_the_error_of_v_and_teaches_the_last_timestep() -> None:
    t = torch.tensor([0, 500, 998, 999])
    x, wanted = randn(0, 4, 3, 4, 4), randn(1, 4, 3, 4, 4)
    own = randn(2, 4, 3, 4, 4).requires_grad_()
    read = PARAMETERIZATIONS["v"]
    target, prediction = (Prediction(read.eps(SCHEDULE, x, t, v), read.x_0(SCHEDULE, x, t, v)) for v in (wanted, own))
    loss = space_loss(SCHEDULE, t, target, prediction, "v")
    expected = (wanted - own).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)  # float32 differences of eps near pure noise
    torch.testing.assert_close(loss[3].double(), expected[3], rtol=1e-5, atol=0)
    loss.sum().backward()
    assert own.grad is not None and own.grad.isfinite().all() and own.grad[3].abs().min() > 0


def test_the_bound_is_finite_at_the_last_timestep() -> None:
    t, x = torch.tensor([998, 999]), randn(0, 2, 3, 4, 4)
    outputs = [Prediction(x, randn(i, 2, 3, 4, 4), randn(i + 5, 2, 3, 4, 4).tanh()) for i in (1, 2)]
    for clips in (True, False):
        assert vlb_loss(SCHEDULE, x, t, outputs[0], outputs[1], clips).isfinite().all()


@pytest.mark.parametrize(("loss", "words"), [({}, "space: eps"), ({"space": "v", "weight_cap": 9.0}, "weight_cap")])
def test_a_loss_that_leaves_the_last_timestep_out_is_refused(loss: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"{words}.* teaches nothing at t = T-1"):
        check_loss(LossConfig(**loss), SCHEDULE)
    check_loss(LossConfig(space="v"), SCHEDULE)


def test_a_network_of_eps_is_refused() -> None:
    with pytest.raises(UserError, match=r"^parameterization: eps says nothing about x_0 at t = T-1"):
        DiffusionModel(OfGaussian("v"), schedule=SCHEDULE, shape=(1, 4, 4))
    with pytest.raises(UserError, match=r"^parameterization: eps says nothing"):
        gaussian("v").changed(parameterization="eps")


def test_the_teacher_check_has_finite_figures() -> None:
    assert measure(gaussian("v", side=8)).finite and measure(gaussian("x0", side=8)).finite


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_student_inherits_the_process_and_keeps_it_on_disk(kind: str, tmp_path: Path) -> None:
    teacher = DiffusionModel(randomised(UNet(**UNET_PARAMS)), schedule=SCHEDULE, parameterization=kind, space="pixel")
    student = teacher.student(teacher.node)
    assert student.diffusion == teacher.diffusion and student.diffusion.timestep_spacing == "trailing"
    for form, name in (("folder", "a"), ("safetensors", "b.safetensors"), ("diffusers", "c")):
        student.save(tmp_path / name, form)
        again = load_model(tmp_path / name)
        assert (again.diffusion, again.parameterization) == (student.diffusion, kind)
        assert torch.equal(again.schedule.alphas_cumprod, SCHEDULE.alphas_cumprod)
