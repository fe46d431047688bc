"""The teacher check: a good teacher passes, and each fault is refused with its reason."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.checkpoints import Hints
from ldm_dkdm.commands.arguments import read_hints
from ldm_dkdm.evaluation.interpretations import other_interpretations, reinterpreted
from ldm_dkdm.evaluation.teacher_check import (
    CheckFigures,
    Row,
    best_of,
    fault,
    measure,
    preferred,
)
from ldm_dkdm.networks import UNet
from tests.analytic import GaussianNetwork
from tests.cli import distil, write_yaml
from tests.parts import UNET_PARAMS, distill_config

FEW = 16  # images for comparing configurations, half of what the check takes
SHIPPED = Path(__file__).parents[1] / "models" / "teachers" / "emoji64"


@pytest.fixture(scope="module")
def good() -> DiffusionModel:
    return load_model(SHIPPED)


@pytest.fixture(scope="module")
def figures_of_good(good: DiffusionModel) -> CheckFigures:
    return measure(good, images=FEW)


def with_weights(model: DiffusionModel, change: Callable[[nn.Parameter], torch.Tensor]) -> DiffusionModel:
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(change(parameter))
    return model.changed(network=network)


def bare(model: DiffusionModel, hints: Hints | None = None) -> DiffusionModel:
    """The same model as a file would give it that stores no schedule."""
    own = copy.copy(model)
    own.stores_schedule, own.hints = False, hints or model.hints
    return own


class Rough(GaussianNetwork):
    """Errs by 1% of eps."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, t) + 0.14 * torch.sin(40 * x + t.view(-1, 1, 1, 1))


def test_a_good_teacher_of_unclipped_latents_passes_where_x_0_explodes_near_T() -> None:
    cosine, image = NoiseSchedule("cosine"), torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert cosine.alphas_cumprod[-1] < 1e-8
    teacher = DiffusionModel(Rough(cosine, image, std=0.2), schedule=cosine, shape=(3, 16, 16))
    assert fault(measure(teacher)) is None


def test_the_shipped_teacher_passes_with_room_to_spare(good: DiffusionModel) -> None:
    figures = good.check()
    assert figures.cosine > 0.95 and figures.linear < 0.2 and figures.deviation < 0.03
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
def test_broken_weights_are_refused(
    good: DiffusionModel, change: Callable[[nn.Parameter], torch.Tensor], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        with_weights(good, change).check()


def test_an_output_that_is_read_as_something_else_is_refused(good: DiffusionModel) -> None:
    with pytest.raises(UserError, match=r"does not point along pure noise.*parameterization"):
        good.changed(parameterization="eps").check()


def test_another_schedule_is_refused(good: DiffusionModel) -> None:
    diffusion = replace(good.diffusion, schedule="cosine")
    with pytest.raises(UserError, match=r"the schedule .*is not that of these weights"):
        good.changed(diffusion=diffusion).check()


def test_the_right_schedule_is_preferred_where_the_wrong_one_passes(
    good: DiffusionModel, figures_of_good: CheckFigures
) -> None:
    wrong = bare(good).changed(diffusion=replace(good.diffusion, beta_start=0.00085, beta_end=0.012))
    interpretations = dict(other_interpretations(wrong))
    right = interpretations["schedule=scaled_linear num_timesteps=1000 beta_start=0.0015 beta_end=0.0195"]
    assert right.diffusion == good.diffusion and right.network is good.network
    figures = measure(wrong, images=FEW)
    assert fault(figures) is None
    assert preferred(figures, figures_of_good)
    assert not preferred(figures_of_good, figures)


def test_the_right_attention_order_is_preferred(good: DiffusionModel, figures_of_good: CheckFigures) -> None:
    wrong = reinterpreted(good, use_new_attention_order=True)
    right = dict(other_interpretations(wrong))["use_new_attention_order=false"]
    assert right.diffusion == good.diffusion
    x, t = torch.randn(2, *good.shape), torch.tensor([5, 500])
    with torch.no_grad():
        assert torch.equal(right.network.eval()(x, t), good.network.eval()(x, t))
        assert not torch.allclose(wrong.network.eval()(x, t), good.network(x, t), atol=1e-2)
    figures = measure(wrong, images=FEW)
    assert preferred(figures, figures_of_good)
    assert not preferred(figures_of_good, figures)


def test_an_interpretation_is_named_as_the_user_would_write_it(good: DiffusionModel) -> None:
    names = [name for name, _ in other_interpretations(bare(good, Hints(sections=True)))]
    assert {
        "teacher.params.use_new_attention_order=true",
        "diffusion.schedule=cosine diffusion.num_timesteps=4000",
    } <= set(names)


def test_the_head_widths_that_are_usual_are_tried(good: DiffusionModel) -> None:
    names = [name for name, _ in other_interpretations(good)]
    assert {"use_new_attention_order=true", "num_head_channels=64"} <= set(names)
    assert {"num_head_channels=-1 num_heads=1", "num_head_channels=-1 num_heads=4"} <= set(names)
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
    plain = load_model(digits_teacher, null_label=0)
    guided = plain.changed(guidance=8.0)
    assert measure(guided).rows != measure(plain).rows
    reasons = []
    for teacher in (plain, guided):
        try:
            reasons.append(teacher.check().rows)
        except UserError as error:
            reasons.append(str(error))
    assert reasons[0] == reasons[1]


def test_an_interpretation_that_alone_predicts_posterior_means_is_preferred_whatever_the_errors_are() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, errors = (Row(500, 0.1, 0.1, 0.95),) * 2, torch.full((32,), -3.0)

    def figures(bias: float) -> CheckFigures:
        return CheckFigures(1.0, rows, 0.1, errors, bias + 0.01 * torch.randn(32, generator=generator))

    biased, right, worse = figures(0.05), figures(0.0), figures(0.08)
    assert preferred(biased, right)
    assert not preferred(right, biased) and not preferred(right, right)
    assert not preferred(biased, worse) and not preferred(worse, biased)  # neither of the two is right


def test_of_several_better_interpretations_the_one_without_bias_is_named_then_the_smallest_error() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (Row(500, 0.1, 0.1, 0.95),) * 2

    def figures(bias: float, error: float) -> CheckFigures:
        noise = 0.01 * torch.randn(32, generator=generator)
        return CheckFigures(1.0, rows, 0.1, torch.full((32,), error).log(), bias + noise - noise.mean())

    own, biased = figures(0.1, 0.187), figures(0.05, 0.14)
    first, second = figures(0.0, 0.154), figures(0.0, 0.152)
    assert best_of(own, {"biased": biased, "first": first, "second": second}) == ("second", second)
    assert best_of(own, {"biased": biased}) == ("biased", biased)
    assert best_of(own, {}) == ("", own)


def test_a_file_that_stores_its_schedule_is_offered_no_other(good: DiffusionModel) -> None:
    assert good.stores_schedule
    assert not any("schedule=" in words for words, _ in other_interpretations(good))
    assert any("schedule=" in words for words, _ in other_interpretations(bare(good)))


def test_every_interpretation_is_accepted_by_the_loader(tmp_path: Path) -> None:
    params = {**UNET_PARAMS, "model_channels": 64, "num_head_channels": 64, "num_heads": 1}
    model = DiffusionModel(UNet(**params), schedule=NoiseSchedule("cosine", 100), space="pixel")
    torch.save(model.network.state_dict(), file := tmp_path / "bare.pt")
    hints = {"image_size": 8, "num_head_channels": 64, "use_new_attention_order": False, "space": "pixel"}
    found = load_model(file, **hints, betas=model.schedule.betas.tolist())
    interpretations = dict(other_interpretations(found))
    assert "rescale_timesteps=true" in interpretations
    assert {"num_head_channels=-1 num_heads=4", "schedule=cosine num_timesteps=1000 betas=null"} <= set(interpretations)
    base = {**hints, "betas": model.schedule.betas.tolist()}
    for words, interpretation in interpretations.items():
        again = load_model(file, **{**base, **read_hints(words.split())})
        assert again.diffusion == interpretation.diffusion, words
        x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
        assert torch.equal(again.predict(x, t).eps, interpretation.predict(x, t).eps), words
