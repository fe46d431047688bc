"""Runs and samples from Python where the process has torch settings of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ldm_dkdm as dkdm
from ldm_dkdm.networks import DiT
from tests.cli import contents
from tests.test_python_api import NUMBERS, own_student, same, unet_student, weights

SHORT = {**NUMBERS, "steps": 2, "save_every": 2}


@pytest.fixture
def teacher(teacher_folder: Path) -> dkdm.DiffusionModel:
    return dkdm.load_model(teacher_folder)


def on_another_device() -> None:
    torch.set_default_device("meta")  # stands for cuda


def in_double() -> None:
    torch.set_default_dtype(torch.float64)


def in_bf16() -> None:
    torch.set_default_dtype(torch.bfloat16)


@pytest.fixture(params=[on_another_device, in_double, in_bf16])
def setting(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Change a default of torch."""
    yield request.param
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def usual(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], Path]:
    """What the calls give under torch's own defaults, and their folder."""
    teacher, folder = dkdm.load_model(teacher_folder), tmp_path_factory.mktemp("usual")
    return _calls(teacher, unet_student(teacher), folder), folder


def _calls(teacher: dkdm.DiffusionModel, student: dkdm.DiffusionModel, folder: Path) -> list[Tensor]:
    states = torch.linspace(-1, 1, 192, dtype=torch.float32, device="cpu").view(1, 3, 8, 8)
    found = [teacher.predict(states, 3).eps]
    found += [teacher.sample(2, sampler=name, steps=3) for name in ("ddim", "ddpm", "dpm-solver++")]
    for mode in ("ancestral", "ddim", "noise"):
        dkdm.distill(teacher, student, folder / mode, **SHORT | {"warmup": {"mode": mode, "batch_size": 4}})
    return [*found, *weights(student).values()]


def test_defaults_of_torch_change_no_result(
    setting: Callable[[], None], usual: tuple[list[Tensor], Path], teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    student, (wanted, folder) = unet_student(teacher), usual
    setting()
    for one, other in zip(wanted, _calls(teacher, student, tmp_path / "other"), strict=True):
        assert torch.equal(one, other)
    if torch.get_default_device().type == "meta":
        assert dkdm.load_model(folder / "noise").device.type == unet_student(teacher).device.type == "cpu"


@pytest.fixture(scope="module")
def models(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in two formats, and the teacher."""
    teacher, folder = dkdm.load_model(teacher_folder), tmp_path_factory.mktemp("models")
    sizes = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    dit = DiT(**sizes, learn_sigma=False, freq_shift=1, own_embedders=True)
    for format in ("folder", "diffusers"):
        dkdm.DiffusionModel(dit, like=teacher).save(folder / format, format)
    (folder / "teacher").symlink_to(teacher_folder)
    return folder


def _found(models: Path, again: Path) -> list[object]:
    samples = [dkdm.load_model(models / name).sample(2, steps=2) for name in ("folder", "diffusers")]
    dkdm.load_model(models / "diffusers").save(again, "diffusers")
    images = torch.arange(8 * 48, device="cpu").view(8, 4, 4, 3).to(torch.uint8)
    distances = dkdm.measure(images, images.flip(1), metrics=["fd"], features="efficientnet-lite0")
    return [*samples, dkdm.load_model(models / "teacher").sample(1, steps=1), distances.figures["FD-efficientnet"]]


@pytest.fixture(scope="module")
def usually_found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    return _found(models, tmp_path_factory.mktemp("usual") / "again")


def test_what_is_read_under_other_defaults_is_the_same(
    setting: Callable[[], None], models: Path, usually_found: list[object], tmp_path: Path
) -> None:
    setting()
    for one, other in zip(usually_found, _found(models, tmp_path / "again"), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_student_in_another_number_format_is_refused_in_one_line(
    teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        student = own_student(teacher)
        student.network.to(dtype)
        with pytest.raises(
            dkdm.UserError, match=f"student: .* {str(dtype)[6:]} weights, .* call network.float"
        ) as found:
            dkdm.distill(teacher, student, tmp_path / "run", **SHORT | {"warmup": "noise"})
        assert "\n" not in str(found.value)
    assert contents(tmp_path) == {}


def test_a_probed_student_keeps_the_modes_of_its_layers(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    student = own_student(teacher)
    student.network.train().outer.eval()
    with pytest.raises(dkdm.UserError, match="vlb_weight"):  # found after the probe
        dkdm.distill(teacher, student, tmp_path / "run", loss={"vlb_weight": 0.5}, **SHORT)
    assert student.network.inner.training and not student.network.outer.training


def test_a_run_within_inference_mode_trains(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    inside, outside = own_student(teacher), own_student(teacher)
    with torch.inference_mode():
        inside.sample(1, steps=1)
        dkdm.distill(teacher, inside, tmp_path / "inside", **SHORT)
        assert torch.is_inference_mode_enabled()
        with pytest.raises(dkdm.UserError, match=r"made within torch\.inference_mode"):
            dkdm.distill(teacher, own_student(teacher), tmp_path / "refused", **SHORT)
    assert not (tmp_path / "refused").exists()
    dkdm.distill(teacher, outside, tmp_path / "outside", **SHORT)
    assert same(weights(inside), weights(outside))


def test_a_run_trains_after_calls_within_inference_mode(teacher_folder: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        teacher = dkdm.load_model(teacher_folder)
        teacher.sample(1, steps=1)
    dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **SHORT)


def test_a_measurement_draws_no_random_numbers_of_the_user() -> None:
    images = torch.zeros(6, 16, 16, 3, dtype=torch.uint8)
    before = torch.get_rng_state()
    dkdm.measure(images, images, metrics=["fd"], features="efficientnet-lite0")
    assert torch.equal(torch.get_rng_state(), before)
