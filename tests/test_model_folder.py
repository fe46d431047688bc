"""Model folders: what comes back, what stays inside, what a failed write leaves behind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.model_folder import write_folder
from ldm_dkdm.checkpoints.source import home_of
from ldm_dkdm.config.schema import FirstStageCard
from tests.parts import VQ_PARAMS

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
CARD = FirstStageCard("model.safetensors", "ldm_dkdm.first_stage.VQModel", VQ_PARAMS)


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("escape", ["../model.safetensors", "sub/model.safetensors", "/etc/hostname"])
def test_weights_outside_the_folder_are_refused(tmp_path: Path, escape: str) -> None:
    folder = tmp_path / "model"
    write_folder(folder, CARD, TENSORS)
    for elsewhere in (tmp_path, folder / "sub"):
        elsewhere.mkdir(exist_ok=True)
        save_file(TENSORS, elsewhere / "model.safetensors")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("weights: model.safetensors", f"weights: {escape}"))
    with pytest.raises(UserError, match="must be a file name"):
        FirstStageSource(folder).opened()


def test_a_folder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_folder(tmp_path, CARD, {**TENSORS, "count": torch.tensor([2**40])}, torch.float16)
    stage = FirstStageSource(tmp_path).opened()
    assert (stage.target, stage.params, stage.scale_factor) == (CARD.target, CARD.params, CARD.scale_factor)
    expected = {name: value.half() for name, value in TENSORS.items()}
    assert _equal(stage.tensors, {**expected, "count": torch.tensor([2**40])})


def test_weights_mean_the_folder_whose_config_names_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", CARD, TENSORS)
    weights = tmp_path / "model" / "model.safetensors"
    assert home_of(weights) == tmp_path / "model"
    (tmp_path / "model" / "config.yaml").write_text("model: {target: x}")  # a third-party config
    assert home_of(weights) == weights
    (tmp_path / "model" / "config.yaml").write_text("a: [")
    assert home_of(weights) == weights


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, CARD, TENSORS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_folder(
            tmp_path,
            FirstStageCard("model.safetensors", "ldm_dkdm.first_stage.AutoencoderKL", {}),
            {"b": torch.zeros(1)},
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
