"""What the loss weighs: spaces, caps, lambda."""

import pytest
import torch
from torch import Tensor, nn

from ldm_dkdm import DiffusionModel, NoiseSchedule
from ldm_dkdm.config.schema import LossConfig, TrainerConfig
from ldm_dkdm.diffusion.objectives import loss_weight, simple_loss, vlb_loss
from ldm_dkdm.diffusion.process import eps_to_x0
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.records import DistillBatch, Prediction

SCHEDULE = NoiseSchedule()
T = torch.tensor([0, 10, 500, 999])


def randn(seed: int, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def to_v(x: Tensor, eps: Tensor) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, Eq. 13)."""
    abar = SCHEDULE.alphas_cumprod[T].view(-1, 1, 1, 1)
    return abar.sqrt() * eps - (1 - abar).sqrt() * eps_to_x0(SCHEDULE, x, T, eps)


def test_an_eps_error_is_weighed_into_the_error_of_another_space() -> None:
    x, ours, theirs = randn(1), randn(2), randn(3)
    eps_error = (ours - theirs).square().flatten(1).mean(1)
    for space, change in (("v", to_v), ("x0", lambda x, eps: eps_to_x0(SCHEDULE, x, T, eps))):
        error = (change(x, ours) - change(x, theirs)).square().flatten(1).mean(1)
        found = loss_weight(SCHEDULE, T, space) * eps_error
        torch.testing.assert_close(found, error, rtol=1e-5, atol=0, check_dtype=False)
    assert loss_weight(SCHEDULE, T, "eps").tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("space", ["v", "x0"])
def test_a_cap_bounds_the_weight_and_nothing_else(space: str) -> None:
    free, capped = loss_weight(SCHEDULE, T, space), loss_weight(SCHEDULE, T, space, 2.0)
    assert free.max() > 100
    assert torch.equal(capped, free.clamp(max=2.0))


class Fixed(nn.Module):
    """Predicts the same whatever it sees."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.output


@pytest.mark.parametrize("vlb_weight", [0.0, 1.0, 3.5])
def test_a_training_step_is_the_weighted_simple_loss_plus_lambda_times_vlb(vlb_weight: float) -> None:
    x, target = randn(1).float(), Prediction(randn(2).float(), randn(3).float().tanh(), randn(4).float().tanh())
    loss = LossConfig(space="v", weight_cap=5.0, vlb_weight=vlb_weight, clip_student=vlb_weight == 1)
    network, trainer = Fixed(randn(5, channels=6).float()), TrainerConfig(max_steps=1, learning_rate=1.0)
    model = DiffusionModel(network, schedule=SCHEDULE, space="pixel", shape=(3, 4, 4))
    module = StudentModule(model, loss, trainer)
    module.log = lambda *args, **kwargs: None
    prediction = model(x, T)
    weighted = loss_weight(SCHEDULE, T, "v", 5.0) * simple_loss(target.eps, prediction.eps)
    expected = weighted.mean() + vlb_weight * vlb_loss(SCHEDULE, x, T, target, prediction, vlb_weight == 1).mean()
    torch.testing.assert_close(module.training_step(DistillBatch(x, T, target), 0), expected)


def test_the_learning_rate_follows_its_schedule_by_steps_or_by_time() -> None:
    network = Fixed(randn(5, channels=3).float())
    model = DiffusionModel(network, schedule=SCHEDULE, space="latent", shape=(3, 4, 4))

    def factors(schedule: str, time_used: float = 0.0) -> list[float]:
        config = TrainerConfig(max_steps=100, learning_rate=1.0, lr_schedule=schedule, lr_warmup=4)
        module = StudentModule(model, LossConfig(), config)
        module.time_used = time_used
        (factor,) = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas
        return [factor(step) for step in (0, 10, 70, 85, 100)]

    assert factors("constant") == pytest.approx([0.2, 1, 1, 1, 1])
    assert factors("cosine")[2:] == pytest.approx([0.206107, 0.054497, 0], abs=1e-6)
    assert factors("cosine", 0.85)[1:] == pytest.approx([0.054497, 0.054497, 0.054497, 0], abs=1e-6)
