"""Models with few diffusion steps: defaults that were made for T = 1000 fit them, or the key is named."""

import math
from pathlib import Path

import pytest

import ldm_dkdm as dkdm
from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError
from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import LoggingConfig, WarmupConfig
from ldm_dkdm.evaluation.held_out import eps_error_by_quarter, eps_errors, held_out_chains
from ldm_dkdm.networks import UNet
from tests.parts import UNET_PARAMS, randomised


def model(steps: int) -> DiffusionModel:
    network = randomised(UNet(**UNET_PARAMS), seed=1)
    return DiffusionModel(network, schedule=NoiseSchedule("cosine", steps), space="pixel")


@pytest.mark.parametrize("steps", [4, 5, 7, 12, 20, 50, 99])
def test_every_quarter_of_t_has_states(steps: int) -> None:
    teacher = model(steps).frozen()
    states = held_out_chains(teacher, chains=1, seed=0)
    errors = eps_error_by_quarter(eps_errors(model(steps).predict, states), states, steps)
    assert all(map(math.isfinite, errors))
    assert set(((states.t * 4) // steps).tolist()) == {0, 1, 2, 3}


def test_an_evaluation_takes_all_steps_where_there_are_few() -> None:
    teacher = model(12).frozen()
    figures = dkdm.evaluate(model(12), teacher, images=65, chains=1)
    assert "-c 12" in figures["measured_with"]
    figures = dkdm.evaluate(model(3), model(3), images=0, chains=1)
    assert {"agreement", "agreement_q3"} <= set(figures) and "agreement_q4" not in figures  # no t in that quarter


def test_defaults_are_at_most_T_and_larger_numbers_are_refused() -> None:
    assert steps_within(LoggingConfig(), "sample_steps", 12) == 12
    assert steps_within(WarmupConfig(), "steps", 1000) == 50
    with pytest.raises(UserError, match="sample_steps: 13 is more than the 12 diffusion steps"):
        steps_within(LoggingConfig(sample_steps=13), "sample_steps", 12)


@pytest.mark.parametrize("mode", ["ancestral", "harvest", "ddim", "dpm-solver++", "noise"])
def test_a_distillation_with_few_steps_runs_with_the_defaults(mode: str, tmp_path: Path) -> None:
    teacher = model(12)
    numbers = {"steps": 2, "batch_size": 2, "rho": 0.5, "sample_every": 2, "sample_count": 2, "precision": "32"}
    made = dkdm.distill(
        teacher, model(12), tmp_path / "run", warmup=mode, check=False, progress=False, accelerator="cpu", **numbers
    )
    assert made.step == 2
    assert len(list((tmp_path / "run" / "samples").glob("step=*.png"))) == 1
