"""Models with few diffusion steps: defaults that were made for T = 1000 fit them, or the key is named."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors import safe_open

import ldm_dkdm as dkdm
from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError
from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import LoggingConfig, WarmupConfig
from ldm_dkdm.evaluation.agreement import KEPT_STATES, Sizes, new_reference
from ldm_dkdm.evaluation.held_out import eps_error_by_quarter, eps_errors, held_out_chains, kept_timesteps
from ldm_dkdm.evaluation.reference import cached_reference
from ldm_dkdm.evaluation.sources import key_of
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


@pytest.mark.parametrize("steps", [1, 3, 19, 20, 21, 25, 30, 39, 50, 99, 1000])
def test_the_states_of_20_timesteps_or_all_are_kept_at_even_distances(steps: int) -> None:
    kept = kept_timesteps(steps, KEPT_STATES)
    assert len(set(kept)) == len(kept) == min(20, steps) and kept[0] >= 0 and kept[-1] < steps
    gaps = {after - before for before, after in pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if steps in (20, 1000):  # as versions before
        assert kept == list(range(steps // 40, steps, steps // 20))


def test_an_evaluation_at_30_timesteps_says_the_error_at_20() -> None:
    teacher = model(30).frozen()
    assert len(new_reference(teacher, 0, Sizes(chains=1, images=1, steps=1)).states.t) == 20


@pytest.mark.parametrize(("steps", "others"), [(12, False), (20, False), (30, True), (40, False)])
def test_chains_that_older_versions_cached_serve_where_their_timesteps_are_the_same(
    steps: int, others: bool, tmp_path: Path
) -> None:
    cached_reference(model(steps).frozen(), 0, Sizes(chains=1, images=1, steps=1), tmp_path, 1, False)
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["reference"])["facts"]
    assert file.stem == key_of("agreement", 1, facts) and ("kept_timesteps" in facts) == others


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
