"""`dkdm sample --batch_size auto`: the batch that fills a device, from what a few images take."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.model import DiffusionModel, filling, load_model
from ldm_dkdm.model.filling import MOST, PROBES, SHARE, Memory, filled, fitting
from ldm_dkdm.model.ranks import ALONE, Ranks
from tests.cli import sample

FIXED, EACH = 1000, 10


class Told(Memory):
    """A device where an image takes EACH bytes, and a call FIXED."""

    def __init__(self, free: int) -> None:
        self.bytes, self.images = free, list[int]()

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return FIXED + EACH * self.images[-1]

    def free(self) -> int:
        return self.bytes


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, teacher_folder: Path) -> Callable[[int], tuple[DiffusionModel, Told]]:
    """Makes a model whose device tells that so many bytes are free, and counts the images of its calls."""

    def make(free: int) -> tuple[DiffusionModel, Told]:
        model, memory = load_model(teacher_folder), Told(free)
        predict = model.predict

        def counted(x: torch.Tensor, *rest: torch.Tensor) -> object:
            memory.images.append(len(x))
            return predict(x, *rest)

        monkeypatch.setattr(model, "predict", counted)
        monkeypatch.setattr(filling, "memory_of", lambda device: memory)
        return model, memory

    return make


@pytest.mark.parametrize(
    ("room", "batch"), [(FIXED + 128 * EACH, 128), (FIXED + 127 * EACH, 64), (10**9, MOST), (0, 1)]
)
def test_the_batch_is_the_largest_that_fits(room: int, batch: int) -> None:
    few, more = (FIXED + EACH * images for images in PROBES)
    assert fitting(few, more, round(room / SHARE) + 1) == batch


def test_a_few_images_are_measured(told: Callable[[int], tuple[DiffusionModel, Told]]) -> None:
    model, memory = told(round((FIXED + 40 * EACH) / SHARE) + 1)
    assert filled(model, SamplingConfig(count=1000)).batch_size == 32
    assert memory.images == [PROBES[0], *PROBES]  # the first call loads what is loaded once


@pytest.mark.parametrize(("ranks", "others", "batch"), [(1, [], 100), (8, [MOST], 13), (2, [16], 16)])
def test_ranks_share_the_images_in_batches_of_one_size(
    ranks: int,
    others: list[int],
    batch: int,
    told: Callable[[int], tuple[DiffusionModel, Told]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = told(10**9)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, *others])
    together = Ranks(0, ranks) if ranks > 1 else ALONE
    assert filled(model, SamplingConfig(count=100), together).batch_size == batch


def test_a_device_that_does_not_tell_its_memory_keeps_the_usual_batch(teacher_folder: Path) -> None:
    assert filled(load_model(teacher_folder), SamplingConfig(count=1000, batch_size=64)).batch_size == 64


def test_the_command_takes_auto(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-r", teacher_folder, "-n", 3, "-c", 2, "--npz", "--no_png"]
    assert sample(*arguments, "--batch_size", "auto", "-l", tmp_path / "auto") == 0
    assert re.search(r"--batch_size auto: 3 images of \S+", capsys.readouterr().out)
    assert sample(*arguments, "-l", tmp_path / "usual") == 0
    one, other = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("auto", "usual"))
    assert np.array_equal(one, other)


def test_other_words_than_auto_are_refused(teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("-r", teacher_folder, "--batch_size", "many") == 2
    assert "--batch_size: must be a whole number or auto, got 'many'" in capsys.readouterr().err
