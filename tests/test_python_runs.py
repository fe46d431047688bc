"""Runs from Python: networks of any kind, what a finished run gives back, what a second call refuses."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm.networks import NETWORKS, UNet
from tests import digits as pixel
from tests.cli import contents, distil, run_script, sample, write_yaml
from tests.parts import distill_config
from tests.test_python_api import NUMBERS, TRAINING, Net, new_pixel_model, own_student, same, weights

SHORT = {**NUMBERS, "steps": 2, "save_every": 2, "warmup": "noise"}


@pytest.fixture
def teacher(teacher_folder: Path) -> dkdm.DiffusionModel:
    return dkdm.load_model(teacher_folder)


class Tied(Net):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 16, 3, padding=1)
        self.again.weight = self.inner.weight

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.outer(torch.tanh(self.inner(x) + self.again(x)))


class Noted(Net):
    """A network with extra state, which no weights file holds."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"note": "mine"}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        pass


def test_a_student_with_tied_weights_is_saved_and_resumed(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    trained = dkdm.DiffusionModel(Tied(), like=teacher)
    dkdm.distill(teacher, trained, tmp_path / "run", **SHORT)
    dkdm.distill(teacher, trained, tmp_path / "run", resume=True, **{**SHORT, "steps": 4})
    trained.save(tmp_path / "saved")
    for folder in ("run", "saved"):
        again = dkdm.load_model(tmp_path / folder, network=Tied())
        assert same(weights(again), weights(trained))
        assert torch.equal(again.network.again.weight, again.network.inner.weight)


def test_a_student_that_cannot_be_saved_is_refused_before_the_run(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(dkdm.UserError, match="student: _extra_state in its state_dict is a dict; a weights file"):
        dkdm.distill(teacher, dkdm.DiffusionModel(Noted(), like=teacher), tmp_path / "run", **SHORT)
    assert contents(tmp_path) == {}


def test_another_network_does_not_go_on_in_a_run(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **SHORT)
    before = contents(tmp_path)
    edited = type("Net", (Tied,), {"__module__": Net.__module__})  # the user has edited the class
    wider, more = Net(), edited()
    wider.inner, wider.outer = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 3, 3, padding=1)
    for network, fault in ((wider, r"inner\.weight \(16, .* instead of \(20,"), (more, "keys missing: again.weight")):
        for steps in (2, 4):
            student = dkdm.DiffusionModel(network, like=teacher, parameterization="v")
            with pytest.raises(dkdm.UserError, match=f"ckpt: does not fit this .*{fault}"):
                dkdm.distill(teacher, student, tmp_path / "run", resume=True, **{**SHORT, "steps": steps})
    assert contents(tmp_path) == before


def test_a_student_knows_its_origin_after_the_run_and_after_a_second_call(
    teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    for saved in (tmp_path / "first", tmp_path / "second"):
        student = own_student(teacher)
        assert dkdm.distill(teacher, student, tmp_path / "run", **SHORT).model is student
        written = dkdm.load_model(tmp_path / "run", network=Net())
        assert student.info == written.info and student.info["step"] == 2
        assert student.info["teacher"] == str(teacher.path) and len(student.info["teacher_sha256"]) == 64
        student.save(saved)
        assert dkdm.load_model(saved, network=Net()).info == student.info
        assert (student.path, student.file) == (written.path, written.file)


def test_a_student_of_a_guided_teacher_is_not_guided_again(tmp_path: Path) -> None:
    network = UNet(**{**pixel.UNET, "num_classes": 11, "out_channels": 3})
    labeled = {"space": "pixel", "schedule": dkdm.NoiseSchedule("cosine", 20), "null_label": 10}
    teacher = dkdm.DiffusionModel(network, guidance=2.0, **labeled)
    student = teacher.student(teacher.node)
    dkdm.distill(teacher, student, tmp_path / "run", **SHORT)
    with pytest.raises(dkdm.UserError, match=r"guidance: .*run/student is a student, which has learned"):
        student.changed(guidance=2.0)
    with pytest.raises(dkdm.UserError, match=r"guidance: .* is a student"):
        dkdm.load_model(tmp_path / "run", guidance=2.0)


@pytest.mark.parametrize("format", ["folder", "diffusers", "safetensors", "compvis"])
def test_saving_overwrites_nothing(teacher: dkdm.DiffusionModel, tmp_path: Path, format: str) -> None:
    (tmp_path / "notes").mkdir()
    for mine in (tmp_path / "notes" / "README.md", tmp_path / "file"):
        mine.write_text("mine")
    before = contents(tmp_path)
    for path in (tmp_path / "notes", tmp_path / "file"):
        with pytest.raises(dkdm.UserError, match=f"{path}: exists; choose another name or delete it"):
            teacher.save(path, format)
    assert contents(tmp_path) == before
    for name, target in (("nowhere", "missing"), ("loop", "loop")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(dkdm.UserError, match=f"{tmp_path / name}: is a link to {tmp_path / target}, where nothing"):
            teacher.save(tmp_path / name, format)


def test_a_model_is_saved_into_an_empty_folder(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    teacher.save(tmp_path)
    assert same(weights(dkdm.load_model(tmp_path)), weights(teacher))


def test_an_old_run_keeps_the_name_of_its_model_folder(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pixel.train(tmp_path, "run", {"path": str(digits)}, trainer={"max_steps": 1}) == 0
    run = tmp_path / "run"
    folder = (run / "model").rename(run / "student")
    (folder / "model.safetensors").rename(folder / "student.safetensors")
    card = folder / "config.yaml"
    card.write_text(card.read_text().replace("model.safetensors", "student.safetensors"))
    (run / "student" / "a.safetensors").write_text("another file")
    capsys.readouterr()
    for steps in (1, 2):
        assert run_script("train_ldm.py", "--resume", run, f"trainer.max_steps={steps}") == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"model: {folder}"
        assert dkdm.load_model(run).info["step"] == steps
    assert not (run / "model").exists()


def test_contradictory_arguments_are_refused(
    teacher: dkdm.DiffusionModel, teacher_folder: Path, digits: Path, tmp_path: Path
) -> None:
    def distil(**more: Any) -> None:
        dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **more)

    for key, argument in (("max_steps", "steps"), ("name", "out"), ("dir", "out")):
        value = "3" if argument == "steps" else "FOLDER"
        for given in (key, f"trainer.{key}" if argument == "steps" else f"logging.{key}"):
            with pytest.raises(
                dkdm.UserError, match=f"{given}: is the argument {argument} here; write {argument}={value}"
            ):
                distil(**SHORT, **{given: 3})
    with pytest.raises(dkdm.UserError, match=r"distill\.rho: is the argument rho here; write rho=3"):
        distil(**SHORT, **{"distill.rho": 3})
    for steps in (0, 2.5, "many"):
        with pytest.raises(dkdm.UserError, match=f"^steps: .* got '?{steps}"):
            distil(**SHORT | {"steps": steps})
        with pytest.raises(dkdm.UserError, match=f"^steps: .* got '?{steps}"):
            dkdm.train(new_pixel_model(), digits, tmp_path / "run", **TRAINING | {"steps": steps})
    for empty in ("", " "):
        with pytest.raises(dkdm.UserError, match="out: is empty; give a path"):
            dkdm.distill(teacher, own_student(teacher), empty, **SHORT)
    config = dkdm.load_config(write_yaml(tmp_path / "c.yaml", distill_config(teacher_folder, tmp_path)))
    for key in ("steps", "rho", "seed"):
        with pytest.raises(dkdm.UserError, match=f"{key}: given by config already"):
            distil(config=config, **{key: 1})
    model = new_pixel_model()
    with pytest.raises(dkdm.UserError, match="path: is the argument data here; write data=FOLDER"):
        dkdm.train(model, digits, tmp_path / "run", path="elsewhere", **TRAINING)
    with pytest.raises(dkdm.UserError, match=r"data\.batch_size: 4, but 8 is given by the argument batch_size"):
        dkdm.train(model, {"path": str(digits), "batch_size": 4}, tmp_path / "run", **TRAINING)
    assert not (tmp_path / "run").exists()


def test_a_caller_chooses_the_signals_and_the_advice(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    reports = []

    def interrupt(*progress: object) -> None:
        reports.append(progress)
        if len(reports) == 1:  # a second signal stops at once
            os.kill(os.getpid(), signal.SIGTERM)

    calls = {"signals": (signal.SIGTERM,), "go_on": "press the button again"}
    with pytest.raises(dkdm.Stopped, match=r"stopped and saved .*; press the button again"):
        dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **{**SHORT, "progress": interrupt}, **calls)


def test_another_teacher_without_a_file_does_not_go_on_in_a_run(tmp_path: Path) -> None:
    def run(teacher: dkdm.DiffusionModel, steps: int, **more: Any) -> dkdm.DiffusionModel:
        student = dkdm.DiffusionModel(Net(), like=teacher)
        return dkdm.distill(teacher, student, tmp_path / "run", **{**SHORT, "steps": steps, **more}).model

    first = new_pixel_model()
    other = new_pixel_model()
    with torch.no_grad():
        next(other.network.parameters()).add_(1)
    run(first, 2)
    before = contents(tmp_path)
    for teacher in (other, dkdm.DiffusionModel(first.network, like=first, parameterization="v")):
        with pytest.raises(dkdm.UserError, match="made with another configuration"):
            run(teacher, 2)
        with pytest.raises(dkdm.UserError, match=r"teacher\.ckpt: cannot change"):
            run(teacher, 4, resume=True)
    assert contents(tmp_path) == before
    assert run(new_pixel_model(), 4, resume=True).info["step"] == 4  # the same weights are the same teacher


def test_a_run_goes_on_that_an_older_version_began_without_the_ends_of_its_schedule(
    digits: Path, tmp_path: Path
) -> None:
    """They dropped steps_offset and set_alpha_to_one, so that config, pool and name of the teacher were without."""
    old, new = new_pixel_model(), new_pixel_model()
    new = new.changed(schedule=dkdm.NoiseSchedule(new.schedule.name, new.schedule.num_timesteps, steps_offset=1))
    assert old.diffusion.steps_offset is None and new.diffusion.steps_offset == 1
    for steps, teacher in ((2, old), (4, new)):
        more = {**SHORT, "steps": steps, "resume": steps == 4}
        student = dkdm.DiffusionModel(Net(), like=teacher)
        found = dkdm.distill(teacher, student, tmp_path / "student", **more).model
        assert found.info["step"] == steps
        model = dkdm.DiffusionModel(Net(), like=teacher)
        more = {**TRAINING, "steps": steps, "resume": steps == 4}
        found = dkdm.train(model, digits, tmp_path / "model", **more).model
        assert found.info["step"] == steps and found.schedule.steps_offset == teacher.schedule.steps_offset
    with pytest.raises(dkdm.UserError, match=r"diffusion\.steps_offset: cannot change"):
        dkdm.train(dkdm.DiffusionModel(Net(), like=old), digits, tmp_path / "model", **TRAINING, resume=True)


def test_a_card_is_titled_by_the_run_or_by_its_own_folder(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    student = own_student(teacher)
    dkdm.distill(teacher, student, tmp_path / "first-try", **SHORT)
    (tmp_path / "config.yaml").write_text("a: [")  # another program's
    student.save(tmp_path / "small-faces")
    for folder, title in (("first-try/student", "first-try"), ("small-faces", "small-faces")):
        assert f"\n# {title}\n" in (tmp_path / folder / "README.md").read_text()


NOTEBOOK = """
from torch import nn


class Cell(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.arguments = {"width": width}
        self.inner, self.outer = nn.Conv2d(3, width, 1), nn.Conv2d(width, 3, 1)

    def forward(self, x, t, label=None):
        return self.outer(self.inner(x))
"""


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What plugins add to the process goes with the test."""
    tables: list[dict[str, Any]] = [NETWORKS, sys.modules]
    known = [set(table) for table in tables]
    yield
    for table, names in zip(tables, known, strict=True):
        for name in [name for name in table if name not in names and ("cells" in name or "Cell" in name)]:
            del table[name]


@pytest.mark.usefixtures("forgotten")
def test_commands_open_a_student_from_a_notebook(
    teacher: dkdm.DiffusionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells: dict[str, Any] = {"__name__": "__main__"}
    exec(NOTEBOOK, cells)
    dkdm.distill(teacher, dkdm.DiffusionModel(cells["Cell"](8), like=teacher), tmp_path / "run", **SHORT)
    for name in ("cells_of_mine", "more_cells"):
        (tmp_path / f"{name}.py").write_text(NOTEBOOK)
    use = ("-n", 2, "-c", 2, "-l", tmp_path / "out", "--plugin", tmp_path / "cells_of_mine.py")
    assert sample("-r", tmp_path / "run", *use, "--plugin", tmp_path / "more_cells.py") == 2  # which of the two?
    assert "its network is __main__.Cell" in capsys.readouterr().err
    assert sample("-r", tmp_path / "run", *use) == 0
    assert distil("--resume", tmp_path / "run", "trainer.max_steps=3", *use[-2:]) == 0
