"""Runs from Python: networks of any kind, what a finished run gives back, what a second call refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from tests.cli import contents
from tests.test_python_api import NUMBERS, Net, same, weights

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
