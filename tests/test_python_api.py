"""The package from Python: the example of the design, and what the calls leave in the process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm.config.schema import NetworkConfig
from ldm_dkdm.networks import UNet
from tests import digits as pixel
from tests.cli import ROOT, contents, distil, write_yaml
from tests.parts import UNET_PARAMS, distill_config
from tests.process import changes, process_state

WARMUP = {"mode": "ddim", "steps": 5, "images": 8, "batch_size": 4}
NUMBERS = {
    "steps": 6,
    "batch_size": 4,
    "rho": 0.5,
    "warmup": WARMUP,
    "learning_rate": 1e-3,
    "check": False,
    "precision": "32",
    "accelerator": "cpu",
    "ema_decay": 0.9,
    "save_every": 3,
    "sample_every": 3,
    "sample_count": 2,
    "sample_steps": 2,
    "evaluate_every": 0,
    "progress": False,
}  # those of `distill_config`


class Net(nn.Module):
    """A network of the user's own: no attributes beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.outer(torch.tanh(self.inner(x) + t.view(-1, 1, 1, 1) / 1000))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(model: dkdm.DiffusionModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


@pytest.fixture
def teacher(teacher_folder: Path) -> dkdm.DiffusionModel:
    return dkdm.load_model(teacher_folder)


def own_student(teacher: dkdm.DiffusionModel) -> dkdm.DiffusionModel:
    torch.manual_seed(5)
    return dkdm.DiffusionModel(Net(), like=teacher, parameterization="v")


def unet_student(teacher: dkdm.DiffusionModel) -> dkdm.DiffusionModel:
    """The student of `distill_config`."""
    return teacher.student(NetworkConfig("ldm_dkdm.networks.UNet", UNET_PARAMS, "v"), seed=0)


def test_the_example_of_the_design_works_with_a_network_of_ones_own(tmp_path: Path) -> None:
    teacher = dkdm.load_model("models/teachers/emoji64")
    teacher.check()
    student = dkdm.DiffusionModel(Net(), like=teacher, parameterization="v")
    numbers = {"steps": 2, "batch_size": 2, "rho": 0.05, "warmup": "noise", "check": False, "progress": False}
    result = dkdm.distill(teacher, student, out=tmp_path / "first", sample_steps=2, **numbers)
    assert (result.step, result.folder, result.end) == (2, tmp_path / "first", "trainer.max_steps")
    images = student.sample(2, sampler="dpm-solver++", steps=3, seed=0)
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.uint8
    student.save(tmp_path / "mine")
    for folder in (tmp_path / "mine", tmp_path / "first", tmp_path / "first" / "student"):
        again = dkdm.load_model(folder, network=Net())
        assert same(weights(again), weights(student)) and again.parameterization == "v"
        assert torch.equal(again.sample(2, sampler="dpm-solver++", steps=3, seed=0), images)
    with pytest.raises(dkdm.UserError, match=r"--plugin.*network=") as refusal:
        dkdm.load_model(tmp_path / "mine")
    assert f"{tmp_path / 'mine'}: its network is {__name__}.Net" in str(refusal.value)
    student.save(tmp_path / "mine.safetensors", format="safetensors")
    again = dkdm.load_model(tmp_path / "mine.safetensors", network=Net())
    assert same(weights(again), weights(student)) and again.shape == (3, 16, 16)
    for format in ("diffusers", "compvis", "adm"):
        with pytest.raises(dkdm.UserError, match=r"format: .* has no Net; choose safetensors"):
            student.save(tmp_path / "other", format=format)


def test_a_network_of_ones_own_is_evaluated(teacher: dkdm.DiffusionModel) -> None:
    figures = dkdm.evaluate(own_student(teacher), teacher, images=65, steps=2, chains=2)
    assert figures["student_parameters"] == sum(p.numel() for p in Net().parameters())
    operations = 2 * 8 * 8 * 9 * (3 * 16 + 16 * 3)  # two convolutions of 8x8 states
    assert figures["student_gflops"] == pytest.approx(operations / 1e9, abs=5e-5)
    assert figures["agreement_q4"] > 0 and figures["frechet_student_to_teacher"] > 0


def test_the_same_call_again_returns_the_trained_student_without_the_teacher(
    teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    trained = own_student(teacher)
    first = weights(trained)
    result = dkdm.distill(teacher, trained, tmp_path / "run", **{**NUMBERS, "precision": "bf16"})
    assert teacher.precision == "32"
    assert result.model.network is trained.network and not same(first, weights(trained))
    assert same(weights(trained), load_file(tmp_path / "run" / "student" / "student.safetensors"))
    before, calls = contents(tmp_path), []
    hook = teacher.network.register_forward_pre_hook(lambda *args: calls.append(args))
    again = own_student(teacher)
    result = dkdm.distill(teacher, again, tmp_path / "run", **{**NUMBERS, "precision": "bf16"})
    hook.remove()
    assert same(weights(again), weights(trained)) and result.step == 6 and "already at step 6" in result.end
    assert calls == [] and contents(tmp_path) == before


def test_a_call_with_other_numbers_is_refused_and_changes_nothing(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    dkdm.distill(teacher, own_student(teacher), tmp_path / "run", **NUMBERS)
    before, student = contents(tmp_path), own_student(teacher)
    for other, named in (
        ({"rho": 0.6}, "distill.rho: 0.5 there, 0.6 here"),
        ({"steps": 8}, "trainer.max_steps: 6 there, 8 here"),
        ({"seed": 1}, "trainer.seed: 0 there, 1 here"),
    ):
        with pytest.raises(dkdm.UserError, match=r"made with another configuration.*resume=True") as refusal:
            dkdm.distill(teacher, student, tmp_path / "run", **{**NUMBERS, **other})
        assert str(tmp_path / "run") in str(refusal.value) and f"({named})" in str(refusal.value)
    with pytest.raises(dkdm.UserError, match=r"distill\.rho: cannot change"):
        dkdm.distill(teacher, student, tmp_path / "run", resume=True, **{**NUMBERS, "rho": 0.6})
    assert contents(tmp_path) == before and same(weights(student), weights(own_student(teacher)))


def test_resume_goes_on_to_more_steps_exactly(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    whole, halves = own_student(teacher), own_student(teacher)
    dkdm.distill(teacher, whole, tmp_path / "whole", **NUMBERS)
    dkdm.distill(teacher, halves, tmp_path / "halves", **{**NUMBERS, "steps": 4})
    later = own_student(teacher)
    result = dkdm.distill(teacher, later, tmp_path / "halves", resume=True, **NUMBERS)
    assert result.step == 6 and same(weights(later), weights(whole)) and not same(weights(halves), weights(whole))


def test_python_and_the_script_make_the_same_run_and_go_on_in_each_others(
    teacher: dkdm.DiffusionModel, teacher_folder: Path, tmp_path: Path
) -> None:
    config = distill_config(teacher_folder, tmp_path / "logs")
    config["logging"]["name"] = "script"
    assert distil("--base", write_yaml(tmp_path / "c.yaml", config)) == 0
    student = unet_student(teacher)
    runs = [tmp_path / "logs" / name for name in ("script", "python")]
    dkdm.distill(teacher, student, runs[1], **NUMBERS)
    configs = [dkdm.load_config(run / "config.yaml", ["logging.name=same"]) for run in runs]
    assert configs[0] == configs[1]
    assert_equal_runs(*runs, 6)
    assert distil("--resume", runs[1], "trainer.max_steps=8") == 0
    dkdm.distill(teacher, unet_student(teacher), runs[0], resume=True, **{**NUMBERS, "steps": 8})
    assert_equal_runs(*runs, 8)


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    for file in ("student/student.safetensors", f"checkpoints/step={step:08d}.pool-rank0.safetensors"):
        assert same(load_file(one / file), load_file(other / file)), file


def new_pixel_model() -> dkdm.DiffusionModel:
    torch.manual_seed(0)
    return dkdm.DiffusionModel(UNet(**pixel.UNET), schedule=dkdm.NoiseSchedule("cosine", 40), space="pixel")


TRAINING = {
    "steps": 4,
    "batch_size": 8,
    "flip": False,
    "learning_rate": 1e-3,
    "precision": "32",
    "accelerator": "cpu",
    "ema_decay": 0.9,
    "save_every": 2,
    "sample_count": 4,
    "sample_steps": 4,
    "progress": False,
}


def test_a_model_trains_on_images_as_the_script_trains_it(digits: Path, tmp_path: Path) -> None:
    model = new_pixel_model()
    result = dkdm.train(model, digits, tmp_path / "python", **TRAINING)
    assert result.step == 4 and result.model.network is model.network
    assert pixel.train(tmp_path, "script", {"path": str(digits)}, trainer={"max_steps": 4}) == 0
    files = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("python", "script")]
    assert same(weights(model), files[0]) and same(*files)
    before, again = contents(tmp_path), new_pixel_model()
    assert dkdm.train(again, digits, tmp_path / "python", **TRAINING).step == 4
    assert same(weights(again), weights(model)) and contents(tmp_path) == before
    with pytest.raises(dkdm.UserError, match="made with another configuration"):
        dkdm.train(again, digits, tmp_path / "python", **{**TRAINING, "batch_size": 4})
    with pytest.raises(dkdm.UserError, match="batchsize: unknown argument; did you mean 'batch_size'"):
        dkdm.train(again, digits, tmp_path / "other", batchsize=3, **TRAINING)
    with pytest.raises(dkdm.UserError, match=r"^devices: 5000, but this machine has"):
        dkdm.train(again, digits, tmp_path / "other", devices=5000, **TRAINING)
    assert contents(tmp_path) == before


def test_calls_print_nothing_and_leave_the_process_as_it_was(
    teacher_folder: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = dkdm.load_model(teacher_folder)
    students = own_student(teacher), unet_student(teacher)
    model = new_pixel_model()

    def refused_check() -> None:
        with pytest.raises(dkdm.UserError):
            teacher.check()

    calls = {
        "load_model": lambda: dkdm.load_model(teacher_folder),
        "sample": lambda: teacher.sample(3, steps=3),
        "check": refused_check,
        "narrowed": lambda: teacher.narrowed("1M"),
        "distill": lambda: [dkdm.distill(teacher, s, tmp_path / str(i), **NUMBERS) for i, s in enumerate(students)],
        "train": lambda: dkdm.train(model, digits, tmp_path / "train", **TRAINING),
        "evaluate": lambda: dkdm.evaluate(students[1], teacher, images=65, steps=2, chains=2),
        "save": lambda: students[1].save(tmp_path / "saved"),
    }
    np.random.seed(3)
    for name, call in calls.items():
        before = process_state()
        call()
        assert changes(before) == {}, name
    assert capfd.readouterr() == ("", "")


FIRST_CALLS = """
import sys
from tests.process import changes, process_state

before = process_state()
import ldm_dkdm as dkdm

assert changes(before) == {}, changes(before)
assert not {"torch", "lightning", "numpy"} & set(sys.modules)
import torch

teacher_folder, digits, out = sys.argv[1:]
before = process_state()
teacher = dkdm.load_model(teacher_folder)
assert changes(before) == {}, changes(before)
teacher.sample(2, steps=2)
assert changes(before) == {}, changes(before)
from tests.test_python_api import NUMBERS, TRAINING, Net, new_pixel_model

before = process_state()
student = dkdm.DiffusionModel(Net(), like=teacher)
before["torch"] = torch.get_rng_state().numpy().tobytes()
dkdm.distill(teacher, student, out + "/a", **NUMBERS)
assert changes(before) == {}, changes(before)
dkdm.evaluate(student, teacher, images=65, steps=2, chains=2)
assert changes(before) == {}, changes(before)
model = new_pixel_model()
before["torch"] = torch.get_rng_state().numpy().tobytes()
dkdm.train(model, digits, out + "/b", **TRAINING)
assert changes(before) == {}, changes(before)
"""


def test_first_imports_change_nothing_either(teacher_folder: Path, digits: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_CALLS, str(teacher_folder), str(digits), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
