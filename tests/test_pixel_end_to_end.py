"""Pixel space through the scripts: data -> teacher (Alg. 2) -> student (Alg. 1) -> samples (Alg. 3)."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_dkdm import load_model
from ldm_dkdm.training import ends
from tests.cli import contents, distil, run_script, sample, table
from tests.digits import DIT, TRAINER, distil_config, train

QUIET = {"save_every": 99, "sample_every": 99}  # one save, at the end; no grids


@pytest.fixture
def teacher(digits_teacher: Path) -> Path:
    return digits_teacher


def column(run: Path, name: str) -> np.ndarray:
    """A figure of a run's metrics."""
    return np.array([float(row[name]) for row in table(run / "metrics.csv")])


def test_training_on_data_lowers_the_hybrid_loss(teacher: Path) -> None:
    loss, vlb = (column(teacher.parent, name) for name in ("loss", "vlb"))
    assert loss[-1] < 0.7 * loss[0]
    assert 0 < vlb[-1] < vlb[0]


@pytest.mark.parametrize("variant", ["dynamic", "shuffled", "iterative"])
def test_every_variant_distils_and_resumes_bit_for_bit(variant: str, teacher: Path, tmp_path: Path) -> None:
    options = {"variant": variant, "discard": 0.3, "input_perturbation": 0.1}
    for name in ("whole", "halves"):
        steps = 6 if name == "whole" else 3
        base = distil_config(teacher, tmp_path, name, distill=options, trainer={"max_steps": steps}, logging=QUIET)
        assert distil("--base", base) == 0
    assert distil("--resume", tmp_path / "halves", "trainer.max_steps=6") == 0
    whole, halves = (load_file(tmp_path / name / "student" / "student.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_cnn_teaches_a_vit(teacher: Path, tmp_path: Path) -> None:
    student = {"target": "ldm_dkdm.networks.DiT", "params": DIT, "parameterization": "v"}
    base = distil_config(teacher, tmp_path, "vit", student=student, trainer={"max_steps": 1})
    assert distil("--base", base) == 0
    model = load_model(tmp_path / "vit" / "student")
    assert type(model.network).__name__ == "DiT" and model.diffusion.space == "pixel"
    assert sample("-r", tmp_path / "vit", "-n", 2, "-c", 3, "--labels", 7, "-l", tmp_path / "out") == 0


def test_a_class_conditional_run_can_be_planned(teacher: Path, tmp_path: Path, capsys) -> None:
    assert distil("--base", distil_config(teacher, tmp_path, "planned"), "--plan") == 0
    assert "64 slots (dynamic)" in capsys.readouterr().out
    assert not (tmp_path / "planned").exists()


def test_a_guided_vit_teaches_a_cnn_and_is_what_the_student_is_measured_against(digits: Path, tmp_path: Path) -> None:
    dit = {"target": "ldm_dkdm.networks.DiT", "params": {**DIT, "class_dropout_prob": 0.5}}
    assert train(tmp_path, "vit", {"path": str(digits)}, model=dit, trainer={"max_steps": 10}) == 0
    found = []
    for guidance in (1.0, 4.0):
        name = f"guided-{guidance:g}"
        teacher = {"guidance": guidance}
        base = distil_config(tmp_path / "vit" / "model", tmp_path, name, teacher=teacher, trainer={"max_steps": 1})
        assert distil("--base", base) == 0
        assert run_script("evaluate.py", "-r", tmp_path / name, "-n", 0, "-c", 1, "--chains", 1, "--pairs", 1) == 0
        figures = json.loads((tmp_path / name / "student" / "evaluation.json").read_text())
        found.append([figures[f"untrained_q{n}"] for n in range(1, 5)])
    assert load_model(tmp_path / "guided-4" / "student").null_label is None  # its table ends at 9
    assert not np.allclose(found[0], found[1], rtol=1e-3)


@pytest.mark.parametrize(
    "arguments", [["-c", 5], ["--sampler", "ddpm", "-c", 5], ["--sampler", "dpm-solver++", "-c", 5], ["-v"]]
)
def test_samplers_write_labelled_images_that_depend_on_the_label(
    arguments: list[object], teacher: Path, tmp_path: Path
) -> None:
    outputs = []
    for labels in ([3, 4], [3, 5]):
        out = tmp_path / str(labels[1])
        assert sample("-r", teacher, "-n", 4, *arguments, "--labels", *labels, "--npz", "-l", out) == 0
        outputs.append(np.load(out / "samples.npz"))
    assert outputs[0]["arr_1"].tolist() == [3, 4, 3, 4]
    assert outputs[0]["arr_0"].shape == (4, 8, 8, 3)
    same = [(outputs[0]["arr_0"][i] == outputs[1]["arr_0"][i]).all() for i in range(4)]
    assert same == [True, False, True, False]


def test_the_baselines_train_on_synthetic_data_alone_and_with_a_part_of_the_real(
    digits: Path, teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "synthetic"
    assert sample("-r", teacher, "-n", 20, "-c", 4, "--npz", "--no_png", "-l", out) == 0
    synthetic = {"synthetic": str(out / "samples.npz")}
    few = {"max_steps": 2}
    assert train(tmp_path, "free", synthetic, trainer=few) == 0
    assert train(tmp_path, "limited", {**synthetic, "path": str(digits), "fraction": 0.05}, trainer=few) == 0
    assert train(tmp_path, "based", {"path": str(digits)}, trainer=few) == 0
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("free", "limited", "based")]
    assert not torch.equal(models[0]["out.2.weight"], models[1]["out.2.weight"])
    assert not torch.equal(models[1]["out.2.weight"], models[2]["out.2.weight"])


def judge(monkeypatch: pytest.MonkeyPatch, losses: Iterable[float]) -> None:
    """Let early stops see these losses, one a batch."""
    left = iter(losses)
    monkeypatch.setattr(ends, "figures_of", lambda module: {"loss": next(left)})


def test_early_stop_ends_a_run_that_no_longer_improves_and_still_saves(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, itertools.count())
    stop = {"monitor": "loss", "window": 2, "patience": 2, "min_delta": 1e9}
    assert train(tmp_path, "early", {"path": str(digits)}, trainer={"max_steps": 40, "early_stop": stop}) == 0
    assert max(f.name for f in (tmp_path / "early" / "checkpoints").glob("*.ckpt")) == "step=00000006.ckpt"
    assert load_model(tmp_path / "early" / "model").info["step"] == 2  # the best window's weights, not the last
    before = contents(tmp_path / "early")
    assert train(tmp_path, "early", {"path": str(digits)}, trainer={"max_steps": 40, "early_stop": stop}) == 0
    assert contents(tmp_path / "early") == before


def test_an_early_stop_that_gets_more_patience_goes_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, itertools.count())
    stop = {"monitor": "loss", "window": 2, "patience": 2, "min_delta": 1e9}
    base = distil_config(teacher, tmp_path, "early", trainer={"max_steps": 10, "early_stop": stop}, logging=QUIET)
    assert distil("--base", base) == 0
    for step, change in ((6, "trainer.early_stop.patience=3"), (8, "trainer.early_stop=null")):
        assert sorted((tmp_path / "early" / "checkpoints").glob("*.ckpt"))[-1].name == f"step={step:08d}.ckpt"
        assert load_model(tmp_path / "early" / "student").info["step"] == 2  # the best window's weights
        assert distil("--resume", tmp_path / "early", change) == 0
    assert load_model(tmp_path / "early" / "student").info["step"] == 10


class Clock:
    """Stands in for the clock of a time limit: every look at it takes 10 seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 10
        return self.now


def test_a_time_limit_ends_a_run_with_the_learning_rate_and_more_time_goes_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ends, "time", Clock())
    trainer = {"max_steps": 50, "max_minutes": 1.0, "lr_schedule": "cosine"}
    base = distil_config(teacher, tmp_path, "short", trainer=trainer, logging=QUIET)
    run = tmp_path / "short"
    assert distil("--base", base) == 0
    assert "trainer.max_minutes (1) ends the training at about step 6 of 50" in capsys.readouterr().out
    assert load_model(run / "student").info["step"] == 6
    saved = torch.load(run / "checkpoints" / "step=00000006.ckpt", weights_only=True)
    assert saved["lr_schedulers"][0]["_last_lr"][0] < 0.1 * TRAINER["learning_rate"]
    before = contents(run)
    assert distil("--base", base) == 0
    assert "already ended at step 6 by trainer.max_minutes" in capsys.readouterr().out
    assert contents(run) == before
    assert distil("--resume", run, "trainer.max_minutes=2") == 0
    assert load_model(run / "student").info["step"] == 12


def test_a_run_that_improves_ends_at_max_steps(digits: Path, tmp_path: Path) -> None:
    limits = {
        "max_steps": 34,
        "learning_rate": 0.003,
        "early_stop": {"monitor": "eps_mse", "window": 16, "patience": 9},
    }
    assert train(tmp_path, "whole", {"path": str(digits)}, trainer=limits) == 0
    assert max(f.name for f in (tmp_path / "whole" / "checkpoints").glob("*.ckpt")) == "step=00000034.ckpt"
    assert load_model(tmp_path / "whole" / "model").info["step"] == 32  # the end of the last window, the best


def test_accumulated_batches_are_one_step_and_resume_exactly(teacher: Path, tmp_path: Path) -> None:
    for name, count in (("whole", 4), ("halves", 2)):
        trainer = {"max_steps": count, "accumulate": 3}
        base = distil_config(teacher, tmp_path, name, trainer=trainer, logging=QUIET)
        assert distil("--base", base) == 0
    assert distil("--resume", tmp_path / "halves", "trainer.max_steps=4") == 0
    whole, halves = (contents(tmp_path / name / "student")["student.safetensors"] for name in ("whole", "halves"))
    assert whole == halves


@pytest.mark.parametrize(("names", "code"), [(["zero", "1", 2, *"defghij"], 0), (["zero", "one"], 2)])
def test_a_configuration_names_the_labels_of_an_npz(
    digits: Path, tmp_path: Path, capsys, names: list[object], code: int
) -> None:
    data = {"path": str(digits), "classes": names}
    assert train(tmp_path, "named", data, trainer={"max_steps": 1}) == code
    if code:
        assert "data.classes: 2 names, but the model has 10 classes" in capsys.readouterr().err
        return
    assert "**classes**: 0 zero, 1, 2, 3 d, 4 e" in (tmp_path / "named" / "model" / "README.md").read_text()
