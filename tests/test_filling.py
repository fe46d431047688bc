"""`dkdm sample --batch_size auto`: the batch that fills a device, from what a few images take."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.model import DiffusionModel, filling, load_model
from ldm_dkdm.model.filling import FRACTION, MOST, PROBES, Memory, filled, fitting
from ldm_dkdm.model.ranks import ALONE, Ranks
from tests.cli import sample

FIXED, EACH = 1000, 10  # bytes of a prediction, and of each of its images


class FakeMemory(Memory):
    """A device with so many free bytes, where decoding takes as many for few images as for many."""

    def __init__(self, free: int, decoding: int = 0, most: int = MOST) -> None:
        self.bytes, self.decoding, self.most = free, decoding, most
        self.calls: list[tuple[str, int]] = []

    def peak(self, work: Callable[[], object]) -> int:
        work()
        name, images = self.calls[-1]
        return self.decoding if name == "decode" else FIXED + EACH * images

    def free(self) -> int:
        return self.bytes

    def call(self, name: str, images: int) -> None:
        """Remember a call, which fails with too many images."""
        if images > self.most:
            raise torch.OutOfMemoryError
        self.calls.append((name, images))


@pytest.fixture
def model_on(monkeypatch: pytest.MonkeyPatch, teacher_folder: Path) -> Callable[[FakeMemory], DiffusionModel]:
    """Makes a model on a device with this memory, which counts the images of its calls."""

    def make(memory: FakeMemory) -> DiffusionModel:
        model = load_model(teacher_folder)
        monkeypatch.setattr(model, "predict", lambda x, *rest: memory.call("predict", len(x)))
        monkeypatch.setattr(model.codec(), "decode", lambda states: memory.call("decode", len(states)))
        monkeypatch.setattr(filling, "memory_of", lambda device: memory)
        return model

    return make


def room_for(images: int) -> int:
    """Free bytes that just suffice."""
    return round((FIXED + images * EACH) / FRACTION) + 1


@pytest.mark.parametrize(("free", "batch"), [(room_for(128), 128), (room_for(127), 64), (10**9, MOST), (0, 1)])
def test_the_batch_is_the_largest_that_fits(free: int, batch: int) -> None:
    few, more = (FIXED + EACH * images for images in PROBES)
    assert fitting(few, more, free) == batch


@pytest.mark.parametrize(("free", "batch"), [(700, MOST), (600, 1)])
def test_what_does_not_grow_with_the_images_only_has_to_fit(free: int, batch: int) -> None:
    assert fitting(500, 500, free) == batch


def test_a_few_images_are_measured(model_on: Callable[[FakeMemory], DiffusionModel]) -> None:
    memory = FakeMemory(room_for(40))
    assert filled(model_on(memory), SamplingConfig(count=1000)).batch_size == 32
    assert memory.calls == [(name, images) for name in ("predict", "decode") for images in (1, *PROBES)]


@pytest.mark.parametrize(("decoding", "batch"), [(room_for(30), 32), (2 * room_for(40), 1)])
def test_decoding_in_parts_hides_no_prediction(
    decoding: int, batch: int, model_on: Callable[[FakeMemory], DiffusionModel]
) -> None:
    memory = FakeMemory(room_for(40), round(decoding * FRACTION))  # more than the predictions that are measured
    assert filled(model_on(memory), SamplingConfig(count=1000)).batch_size == batch


def test_images_that_do_not_fit_are_drawn_one_by_one(model_on: Callable[[FakeMemory], DiffusionModel]) -> None:
    assert filled(model_on(FakeMemory(10**9, most=5)), SamplingConfig(count=1000)).batch_size == 1


@pytest.mark.parametrize(("ranks", "others", "batch"), [(1, [], 100), (8, [MOST], 13), (2, [16], 16)])
def test_ranks_share_the_images_in_batches_of_one_size(
    ranks: int,
    others: list[int],
    batch: int,
    model_on: Callable[[FakeMemory], DiffusionModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, *others])
    together = Ranks(0, ranks) if ranks > 1 else ALONE
    assert filled(model_on(FakeMemory(10**9)), SamplingConfig(count=100), together).batch_size == batch


def test_a_cuda_devices_memory_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = [100]
    figures = {
        "memory_allocated": lambda device: allocated[0],
        "max_memory_allocated": lambda device: allocated[0] + 70,
        "memory_reserved": lambda device: 150,
        "mem_get_info": lambda device: (1000, 2000),
        "reset_peak_memory_stats": lambda device: None,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, figure)
    memory = filling.memory_of(torch.device("cuda", 0))
    assert memory is not None and memory.free() == 1050 and memory.peak(lambda: None) == 70


def test_a_device_without_such_figures_keeps_the_usual_batch(teacher_folder: Path) -> None:
    assert filled(load_model(teacher_folder), SamplingConfig(count=1000, batch_size=64)).batch_size == 64


def test_the_command_takes_auto(teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-r", teacher_folder, "-n", 70, "-c", 1, "--npz", "--no_png"]
    assert sample(*arguments, "--batch_size", "auto", "-l", tmp_path / "auto") == 0
    assert re.search(r"--batch_size auto: batches of 64 images", capsys.readouterr().out)
    assert sample(*arguments, "--batch_size", 16, "-l", tmp_path / "sixteen") == 0
    one, other = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("auto", "sixteen"))
    assert len(one) == 70 and abs(one - other).max() <= 1  # rounding


def test_other_words_than_auto_are_refused(teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("-r", teacher_folder, "--batch_size", "many") == 2
    assert "--batch_size: must be a whole number or auto, got 'many'" in capsys.readouterr().err
