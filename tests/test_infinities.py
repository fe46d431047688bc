"""Predictions that are not finite: whose they are is said, and nothing is measured with them."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm import DiffusionModel, UserError, evaluate, load_model
from ldm_dkdm.config.schema import NetworkConfig
from ldm_dkdm.networks import NETWORKS
from tests.test_agreement import Constant, model


@pytest.mark.parametrize(
    ("eps", "fault"),
    [
        (math.nan, r"^the student: its predictions are not finite \(t = 19\); the weights are damaged"),
        (math.inf, "^the student: its predictions are not finite"),
        (1e25, "^the student: the squares of its errors overflow"),
    ],
)
def test_what_is_not_finite_is_not_measured(eps: float, fault: str, teacher_folder: Path, tmp_path: Path) -> None:
    teacher = load_model(teacher_folder)
    sizes = {"chains": 1, "pairs": 1, "steps": 1, "cache": tmp_path}
    with pytest.raises(UserError, match=fault):
        evaluate(model(eps, teacher), teacher, images=0, **sizes)
    if not math.isfinite(eps):
        images = torch.zeros(65, 32, 32, 3, dtype=torch.uint8)
        options = {"metrics": "pixel-frechet", "features": "pixels", "count": 65, "steps": 1, "cache": tmp_path}
        with pytest.raises(UserError, match=r"^model: its predictions are not finite \(t = "):
            dkdm.measure(model(eps, teacher), images + torch.arange(65).view(-1, 1, 1, 1).byte(), **options)


class InfiniteAt(Constant):
    """Predicts infinity at one timestep."""

    def __init__(self, timestep: int) -> None:
        super().__init__(0.0)
        self.timestep = timestep

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x, t).where(t.view(-1, 1, 1, 1) != self.timestep, math.inf)


def test_a_teacher_whose_chains_are_not_finite_is_named(teacher_folder: Path, tmp_path: Path) -> None:
    like = load_model(teacher_folder)
    teacher = DiffusionModel(InfiniteAt(7), like=like)
    with pytest.raises(UserError, match=r"^the teacher: its held-out chains are not finite \(t = 7\); the weights are"):
        evaluate(model(0.0, like), teacher, images=0, chains=1, pairs=1, steps=1, cache=tmp_path)
    assert not list(tmp_path.iterdir())


class Unset(Constant):
    """Scales its input by a parameter that is NaN until weights are loaded, as torch.empty may leave it."""

    in_channels, image_size = 3, 8

    def __init__(self) -> None:
        super().__init__(math.nan)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.eps * x


def test_a_student_whose_random_weights_are_not_finite_is_measured(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(NETWORKS, "tests.Unset", Unset)
    caplog.set_level("INFO", logger="ldm_dkdm")
    teacher, network = load_model(teacher_folder), Unset()
    nn.init.zeros_(network.eps)
    student = DiffusionModel(network, like=teacher, node=NetworkConfig("tests.Unset", {}, "eps"))
    figures = evaluate(student, teacher, images=0, chains=1, pairs=1, steps=1, cache=tmp_path)
    assert figures["agreement"] > 0 and not [name for name in figures if name.startswith("untrained")]
    assert "no untrained_q1 ... untrained_q4: predictions of random weights are not finite" in caplog.text
