"""Options of measurements have an effect or are refused; records say what was done, and by which version."""

import json
from pathlib import Path

import pytest
import torch

from ldm_dkdm import DiffusionModel, UserError, __version__, evaluate, load_model, measure
from ldm_dkdm.evaluation.results import record_in_run, row_of
from tests.cli import run_script
from tests.feature_sets import add_toy

IMAGES = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_DKDM_CACHE", str(tmp_path / "cache"))
    add_toy(monkeypatch)


def changed(folder: Path) -> DiffusionModel:
    model = load_model(folder)
    with torch.no_grad():
        next(model.network.parameters()).mul_(1.5)
    return model


def test_agreement_follows_its_seed_and_says_that_no_images_were_drawn(teacher_folder: Path) -> None:
    teacher, student = load_model(teacher_folder), changed(teacher_folder)
    asked = ({"seed": 3}, {"seed": 4, "pairs": 1, "steps": 1})
    found = [measure(student, teacher, metrics=["agreement"], chains=1, **options) for options in asked]
    wanted = [evaluate(student, teacher, images=0, chains=1, **options) for options in asked]
    assert [one.figures["eps_mse_by_t"] for one in found] == [one["eps_mse_by_t"] for one in wanted]
    assert found[0].figures["eps_mse_by_t"] != found[1].figures["eps_mse_by_t"]
    facts = found[0].samples
    assert facts["images"] is None and not {"seeds", "sampler", "steps"} & set(facts)
    assert facts["agreement by"] == (f"ldm_dkdm {__version__}: dkdm evaluate -n 0 -c 20 --chains 1 --pairs 16 --seed 3")
    assert "measured_with" not in found[0].figures


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chains": -4}, "chains: must be at least 1, got -4"),
        ({"processes": 0}, "processes: must be at least 1, got 0"),
        ({"labels": [7]}, "labels: has no effect; no model is sampled"),
        ({"eta": 1.0}, "eta: has no effect"),
        ({"steps": 3}, "steps: has no effect"),
        ({"sampler": "ddpm"}, "sampler: has no effect"),
        ({"reference_seed": 3}, "reference_seed: has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        measure(IMAGES, IMAGES, features="toy", metrics=["fd"], **options)


def record(figure: str, weights: str, version: str) -> dict[str, object]:
    features = {"features": "inception", "weights_sha256": weights, "resize": "none"}
    sets = {"samples": {"source": "s", "images": 5, "labels": [1, 2]}, "reference": {"source": "r"}}
    return {"figures": {figure: 1.0}, **sets, "features": [features], "warnings": [], "ldm_dkdm": version}


def test_records_of_a_run_keep_every_extractor_and_every_figures_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_dkdm.evaluation.results._in_run", lambda model: True)
    for part in (record("FID", "a", "1"), record("FD-inception-b", "b", "2"), record("KID", "a", "3")):
        path = record_in_run(tmp_path, part)
    found = json.loads(path.read_text())
    assert [used["weights_sha256"] for used in found["features"]] == ["a", "b"]
    assert found["versions"] == {"FID": "1", "FD-inception-b": "2", "KID": "3"}
    assert row_of(record("FID", "a", "1"))["labels"] == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "9" * 23], "--seed: must be at most 4611686018427387904"),
        (["-o", "."], "--out: . is a folder; name a file in it"),
        (["--results", "."], "--results: . is a folder; name a file in it"),
    ],
)
def test_a_huge_seed_and_a_folder_for_a_file_are_refused(
    teacher_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    against = ("-r", teacher_folder, "--teacher", teacher_folder, "-n", 0, "--chains", 1)
    assert run_script("evaluate.py", *against, *words) == 2
    assert said in capsys.readouterr().err
