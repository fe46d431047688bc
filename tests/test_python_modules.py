"""Runs from Python with modules of unusual kinds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from tests.test_python_api import NUMBERS, Net, same, weights

SHORT = {**NUMBERS, "steps": 2, "save_every": 2, "warmup": "noise"}


@pytest.fixture
def teacher(teacher_folder: Path) -> dkdm.DiffusionModel:
    return dkdm.load_model(teacher_folder)


class Normed(Net):
    """A network with batch norms, with a buffer that every call replaces, and one that is a view of a weight."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("view", self.inner.weight.data)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def test_a_saved_student_has_the_batch_statistics_of_the_training(
    teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    whole, parts = (dkdm.DiffusionModel(Normed(), like=teacher) for _ in range(2))
    parts.network.load_state_dict(whole.network.state_dict())
    dkdm.distill(teacher, whole, tmp_path / "whole", **SHORT | {"steps": 4})
    dkdm.distill(teacher, parts, tmp_path / "parts", **SHORT)
    assert parts.network.norm.num_batches_tracked == 2
    dkdm.distill(teacher, parts, tmp_path / "parts", resume=True, **SHORT | {"steps": 4})
    assert same(weights(whole), weights(parts))
    for name in ("whole", "parts"):
        state = torch.load(tmp_path / name / "checkpoints" / "step=00000004.ckpt", weights_only=True)
        current, average = state["current_model_state"], state["state_dict"]
        saved = weights(dkdm.load_model(tmp_path / name, network=Normed()))
        for buffer in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "seen"):
            assert torch.equal(saved[buffer], current[f"network.{buffer}"])
        assert saved["norm.num_batches_tracked"] == saved["seen"] == 4
        assert not torch.equal(average["network.inner.weight"], current["network.inner.weight"])
        assert torch.equal(saved["view"], saved["inner.weight"])  # not the weight of the training
