"""The teacher check: a good teacher passes, and each fault is refused with its reason."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ldm_dkdm.sources import Model, load_model
from torch import nn

from ldm_dkdm import NoiseSchedule, Teacher, UserError
from ldm_dkdm.evaluation.teacher_check import (
    COMPARED,
    Figures,
    Row,
    check_teacher,
    fault,
    measure,
    other_readings,
    preferred,
    reread,
)
from tests.analytic import GaussianNetwork
from tests.cli import distil, write_yaml
from tests.parts import distill_config

SHIPPED = Path(__file__).parents[1] / "models" / "teachers" / "emoji64"


@pytest.fixture(scope="module")
def good() -> Model:
    return load_model(SHIPPED)


def with_weights(model: Model, change: Callable[[nn.Parameter], torch.Tensor]) -> Model:
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(change(parameter))
    return replace(model, network=network)


def check(model: Model) -> None:
    check_teacher(model, model.as_teacher("32"), told=True)


class Rough(GaussianNetwork):
    """Errs by 1% of eps."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, t) + 0.14 * torch.sin(40 * x + t.view(-1, 1, 1, 1))


def test_a_good_teacher_of_unclipped_latents_passes_where_x_0_explodes_near_T() -> None:
    cosine, picture = NoiseSchedule("cosine"), torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert cosine.alphas_cumprod[-1] < 1e-8
    assert fault(measure(Teacher(Rough(cosine, picture, std=0.2), cosine), (3, 16, 16))) is None


def test_the_shipped_teacher_passes_with_room_to_spare(good: Model) -> None:
    figures = check_teacher(good, good.as_teacher("32"), told=True)
    assert figures.along > 0.95 and figures.linear < 0.2 and figures.deviation < 0.03
    x0_errors = [row.x0_error for row in figures.rows]
    assert x0_errors == sorted(x0_errors, reverse=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: torch.randn_like(p) * p.std(correction=0), "no better than a linear filter"),
        (lambda p: p.flatten()[torch.randperm(p.numel())].view_as(p), "no better than a linear filter"),
        (lambda p: p[torch.randperm(len(p))], "no better than a linear filter"),
        (torch.zeros_like, "no better than a linear filter"),
        (lambda p: p * torch.nan, "not finite"),
    ],
    ids=["random", "shuffled", "rows", "zero", "nan"],
)
def test_broken_weights_are_refused(good: Model, change: Callable[[nn.Parameter], torch.Tensor], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(with_weights(good, change))


def test_an_output_that_is_read_as_something_else_is_refused(good: Model) -> None:
    node = replace(good.card.network, parameterization="eps")
    with pytest.raises(UserError, match=r"does not point along pure noise.*parameterization"):
        check(replace(good, card=replace(good.card, network=node)))


def test_another_schedule_is_refused(good: Model) -> None:
    diffusion = replace(good.card.diffusion, schedule="cosine")
    with pytest.raises(UserError, match=r"the schedule .*is not that of these weights"):
        check(replace(good, card=replace(good.card, diffusion=diffusion)))


def test_the_right_schedule_is_preferred_where_the_wrong_one_passes(good: Model) -> None:
    diffusion = replace(good.card.diffusion, beta_start=0.00085, beta_end=0.012)
    wrong = replace(good, card=replace(good.card, diffusion=diffusion))
    readings = dict(other_readings(wrong))
    right = readings["diffusion.schedule=scaled_linear num_timesteps=1000 beta_start=0.0015 beta_end=0.0195"]
    figures = [measure(model.as_teacher("32"), model.latent_shape, images=COMPARED) for model in (wrong, right)]
    assert fault(figures[0]) is None
    assert preferred(figures[0], figures[1])
    assert not preferred(figures[1], figures[0])


def test_the_right_attention_order_is_preferred(good: Model) -> None:
    wrong = reread(good, use_new_attention_order=True)
    right = dict(other_readings(wrong))["use_new_attention_order=false"]
    x, t = torch.randn(2, *good.latent_shape), torch.tensor([5, 500])
    with torch.no_grad():
        assert torch.equal(right.network.eval()(x, t), good.network.eval()(x, t))
        assert not torch.allclose(wrong.network.eval()(x, t), good.network(x, t), atol=1e-2)
    figures = [measure(m.as_teacher("32"), m.latent_shape, images=COMPARED) for m in (wrong, right)]
    assert preferred(figures[0], figures[1])
    assert not preferred(figures[1], figures[0])


def test_the_head_widths_that_are_usual_are_tried(good: Model) -> None:
    names = [name for name, _ in other_readings(good)]
    assert {"use_new_attention_order=true", "num_head_channels=64", "num_heads=1", "num_heads=4"} <= set(names)
    assert "num_head_channels=32" not in names


def test_a_distillation_of_a_random_teacher_does_not_start(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distill_config(teacher_folder, tmp_path / "logs")
    config["teacher"]["check"] = True
    base = write_yaml(tmp_path / "run.yaml", config)
    assert distil("--base", base) == 2
    error = capsys.readouterr().err
    assert "teacher.check=false" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_a_guided_teacher_is_checked_without_its_guidance(digits_teacher: Path) -> None:
    model = load_model(digits_teacher)
    plain, guided = model.as_teacher("32", null_label=0), model.as_teacher("32", guidance=8.0, null_label=0)
    unlike = measure(guided, model.latent_shape)
    assert unlike.rows != measure(plain, model.latent_shape).rows
    reasons = []
    for teacher in (plain, guided):
        try:
            reasons.append(check_teacher(model, teacher, told=True).rows)
        except UserError as error:
            reasons.append(str(error))
    assert reasons[0] == reasons[1]


def test_a_reading_that_alone_predicts_posterior_means_is_preferred_whatever_the_errors_are() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, errors = (Row(500, 0.1, 0.1, 0.95),) * 2, torch.full((32,), -3.0)

    def figures(bias: float) -> Figures:
        return Figures(1.0, rows, 0.1, errors, bias + 0.01 * torch.randn(32, generator=generator))

    biased, right, worse = figures(0.05), figures(0.0), figures(0.08)
    assert preferred(biased, right)
    assert not preferred(right, biased) and not preferred(right, right)
    assert not preferred(biased, worse) and not preferred(worse, biased)  # none of the two is right
