"""Every command takes every model: files of other code bases, described files, folders, runs and their checkpoints."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, load_model
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.networks import DiT, UNet
from tests.cli import distil, run_script, sample, write_yaml
from tests.parts import UNET_PARAMS, distill_config, randomised

HEADS = {"image_size": 8, "num_head_channels": 32}
COSINE = {"schedule": "cosine", "num_timesteps": 20}
LATENT = {"schedule": "scaled_linear", "num_timesteps": 20, "space": "latent", "scale_factor": 0.5}
DIT = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False}
FEW = ("-n", 0, "-c", 4, "--chains", 2, "--pairs", 2)  # of an evaluation


@dataclass(frozen=True)
class Case:
    """A path in the folder of all models, what must be said of it, and what the inspector says."""

    path: str
    said: str
    hints: Mapping[str, object] = field(default_factory=dict)
    stage: bool = False  # its first stage must be named
    raw: bool = False  # the weights as the optimizer left them


CASES = {
    "compvis": Case("model.ckpt", "CompVis latent diffusion", HEADS),
    "adm": Case("adm.pt", "guided-diffusion", {**HEADS, **COSINE, "use_new_attention_order": False}),
    "adm of latents": Case(
        "latents.pt", "guided-diffusion", {**HEADS, **LATENT, "use_new_attention_order": False}, stage=True
    ),
    "dit": Case("dit.pt", "DiT", {"num_heads": 2, **COSINE}),
    "safetensors": Case("model.safetensors", "describe themselves", {"scale_factor": 0.5}, stage=True),
    "pipeline": Case("pipeline", "diffusers folder"),
    "unet in its pipeline": Case("pipeline/unet", "diffusers folder"),
    "unet alone": Case("unet", "diffusers folder", LATENT, stage=True),
    "folder": Case("teacher", "model folder"),
    "weights of a folder": Case("teacher/model.safetensors", "model folder"),
    "run": Case("run", "model folder"),
    "checkpoint": Case("run/checkpoints/step=00000006.ckpt", "training checkpoint"),
    "raw weights": Case("run/checkpoints/step=00000006.ckpt", "training checkpoint", raw=True),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """The folder of all models."""
    home = tmp_path_factory.mktemp("every")
    shutil.copytree(teacher_folder, home / "teacher")
    latent = load_model(teacher_folder)
    latent.save(home / "model.ckpt", "compvis")
    latent.save(home / "latents.pt", "adm")
    latent.save(home / "model.safetensors", "safetensors")
    latent.save(home / "pipeline", "diffusers")
    shutil.copytree(home / "pipeline" / "unet", home / "unet")
    schedule = NoiseSchedule("cosine", 20)
    for name, network in (("adm", UNet(**UNET_PARAMS)), ("dit", DiT(**DIT))):
        DiffusionModel(randomised(network), schedule=schedule, space="pixel").save(home / f"{name}.pt", name)
    run = distill_config(teacher_folder, home, trainer={"ema_decay": 0.5})
    assert distil("--base", write_yaml(home / "run.yaml", run)) == 0
    return home


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def hints_of(case: Case, first_stage: Path) -> dict[str, object]:
    return {**case.hints, **({"first_stage": first_stage} if case.stage else {})}


def words(hints: Mapping[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in hints.items()]


def opened(case: Case, home: Path, first_stage: Path) -> DiffusionModel:
    return load_model(home / case.path, use_ema=False if case.raw else None, **hints_of(case, first_stage))


def test_sample(case: Case, home: Path, first_stage: Path, tmp_path: Path) -> None:
    asked = ("-n", 2, "-c", 4, "--npz", "--no_png", "-l", tmp_path / "out", "--precision", "32")
    flags = ["--raw"] if case.raw else []
    assert sample("-r", home / case.path, *asked, *flags, *words(hints_of(case, first_stage))) == 0
    drawn = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert drawn.std() > 1 and (tmp_path / "out" / "grid.png").is_file()
    assert np.array_equal(drawn, opened(case, home, first_stage).sample(2, steps=4).numpy())


def test_sample_with_the_first_stage_as_a_flag(home: Path, first_stage: Path, tmp_path: Path) -> None:
    for name, given in (("flag", ["--first_stage", first_stage]), ("hint", [f"first_stage={first_stage}"])):
        asked = ("-n", 1, "-c", 2, "--npz", "-l", tmp_path / name)
        assert sample("-r", home / "model.safetensors", *asked, *given, "scale_factor=0.5") == 0
    files = [(tmp_path / name / "grid.png").read_bytes() for name in ("flag", "hint")]
    assert files[0] == files[1]


def quarters(figures: Mapping[str, float], name: str = "agreement") -> list[float]:
    return [figures[f"{name}_q{number}"] for number in range(1, 5)]


def test_evaluate(case: Case, home: Path, first_stage: Path, tmp_path: Path) -> None:
    hints = {**hints_of(case, first_stage), **({"use_ema": False} if case.raw else {})}
    asked = (*FEW, "-o", tmp_path / "figures.json")
    path = home / case.path
    assert run_script("evaluate.py", "-r", path, "--teacher", path, *asked, *words(hints)) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    count = opened(case, home, first_stage).parameters
    assert figures["teacher_parameters"] == figures["student_parameters"] == count
    assert max(quarters(figures)) < 1e-4 < min(quarters(figures, "untrained"))


def test_evaluate_a_run_against_a_teacher_of_another_layout(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    asked = ("-r", home / "run", *FEW, "-o", out)
    errors = []
    for teacher in ([], ["--teacher", home / "model.ckpt", *words(HEADS)]):
        assert run_script("evaluate.py", *asked, *teacher) == 0
        errors.append(quarters(json.loads(out.read_text())))
    assert errors[0] == errors[1]


def test_inspect(case: Case, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("inspect_checkpoint.py", home / case.path) == 0
    report = capsys.readouterr().out
    assert case.said in report and "ldm_dkdm.networks." in report
    assert run_script("inspect_checkpoint.py", home / case.path, "--config") == 0
    assert capsys.readouterr().out.lstrip("# ").strip()


def test_convert(case: Case, home: Path, first_stage: Path, tmp_path: Path) -> None:
    hints = {**hints_of(case, first_stage), **({"use_ema": False} if case.raw else {})}
    out = tmp_path / "out.safetensors"
    assert run_script("convert.py", home / case.path, out, "--to", "safetensors", *words(hints)) == 0
    model, back = opened(case, home, first_stage), load_model(out)
    own, other = model.network.state_dict(), back.network.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert back.diffusion == model.diffusion and back.parameterization == model.parameterization


def test_a_checkpoint_holds_both_kinds_of_weights(home: Path, first_stage: Path) -> None:
    file = home / CASES["checkpoint"].path
    ema, raw, run = (opened(CASES[name], home, first_stage) for name in ("checkpoint", "raw weights", "run"))
    stored = read_tensors(file, "current_model_state")
    assert all(torch.equal(stored[f"network.{name}"], value) for name, value in raw.network.state_dict().items())
    assert all(map(torch.equal, ema.network.state_dict().values(), run.network.state_dict().values()))
    assert not torch.equal(ema.network.out[2].weight, raw.network.out[2].weight)


# Hints for several models


def test_hints_are_for_one_model_or_for_all_that_need_them(home: Path, tmp_path: Path) -> None:
    figures = []
    for heads in (2, 4):
        scoped = ("student.num_heads=2", f"teacher.num_heads={heads}", *words(COSINE))
        asked = ("-r", home / "dit.pt", "--teacher", home / "dit.pt", *FEW)
        assert run_script("evaluate.py", *asked, "-o", tmp_path / "out.json", *scoped) == 0
        figures.append(max(quarters(json.loads((tmp_path / "out.json").read_text()))))
    assert figures[0] < 1e-6 < figures[1]
    asked = ("-n", 1, "-c", 2, "--no_png", "-l", tmp_path)
    assert sample("-r", home / "model.ckpt", home / "teacher", *asked, *words(HEADS)) == 0
    assert sample("-r", home / "teacher", home / "model.ckpt", *asked, *(f"2.{word}" for word in words(HEADS))) == 0


@pytest.mark.parametrize("hint", ["foo=3", "num_heads=7", "schedule=cosine", "target=ldm_dkdm.networks.DiT"])
def test_a_hint_that_no_model_uses_is_refused(
    hint: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = home / "teacher", home / "run"
    for command, models, given in (
        (sample, (one,), hint),
        (sample, (one, two), hint),
        (sample, (one, two), f"2.{hint}"),
        (evaluate, (one, "--teacher", two), hint),
        (evaluate, (one, "--teacher", two), f"teacher.{hint}"),
        (evaluate, (two,), f"teacher.{hint}"),
    ):
        assert command("-r", *models, given) == 2
        error = capsys.readouterr().err
        assert f"{given.partition('=')[0]}: no model uses this hint" in error, error


def evaluate(*arguments: object) -> int:
    return run_script("evaluate.py", *arguments)


def test_raw_weights_of_models_that_have_none_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("-r", home / "teacher", "--raw") == 2
    assert "--raw: no model uses this" in capsys.readouterr().err


# The files of an evaluation


def test_a_runs_parts_know_its_teacher_and_a_checkpoint_keeps_its_own_figures(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    asked, student = FEW, run / "student"
    for part in (run, student, student / "student.safetensors"):
        (student / "evaluation.json").unlink(missing_ok=True)
        assert evaluate("-r", part, *asked) == 0
        assert (student / "evaluation.json").is_file()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert evaluate("-r", run / "checkpoints" / "step=00000003.ckpt", *asked) == 0
    written = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    new = run / "checkpoints" / "step=00000003.evaluation.json"
    assert json.loads(written.pop(new)) != json.loads(before[student / "evaluation.json"]) and written == before
