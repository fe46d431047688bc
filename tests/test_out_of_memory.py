"""Too little memory is one line that names what to lower, and says nothing of a file that may be whole."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import SafetensorError

from ldm_dkdm.checkpoints.pickle_shape import PickleShape
from ldm_dkdm.errors import OutOfMemory, UserError, unreadable
from ldm_dkdm.training import resuming
from ldm_dkdm.training.resuming import Choice
from tests.cli import contents, distil
from tests.hostile_content import Place
from tests.limited import Outcome, commands, outcomes
from tests.parts import VQ_PARAMS
from tests.test_resume import write_config
from tests.training_images import training_images

ROOM = "200"  # MB above what the imports take
MANY = ["-n", "20000", "-c", "2", "--batch_size", "20000"]
LARGE = {"distill.rho": 1000, "distill.warmup.images": 20000, "distill.warmup.batch_size": 20000}


def warm_up(place: Place) -> list[str]:
    return ["distill", "--base", place.base(), *(f"{key}={value}" for key, value in LARGE.items())]


def training(place: Place) -> list[str]:
    return [*place.training(str(training_images(place.path))), "model.params.model_channels=192", "data.batch_size=24"]


def stage(place: Place) -> list[str]:
    params = {**VQ_PARAMS, "ddconfig": {**VQ_PARAMS["ddconfig"], "ch": 96}}
    tree = {
        "first_stage": {"target": "ldm_dkdm.first_stage.VQModel", "params": params},
        "data": {"path": str(training_images(place.path)), "image_size": 32, "batch_size": 24},
        "trainer": {"max_steps": 2, "learning_rate": 1e-3, "accelerator": "cpu", "precision": "32"},
        "logging": {"dir": str(place.path / "logs"), "name": "vq"},
    }
    return ["train-first-stage", "--base", place.new("vq.yaml", yaml.safe_dump(tree))]


def decoding(place: Place) -> list[str]:
    np.savez(place.path / "latents.npz", np.zeros((64, 3, 64, 64), "f4"))
    files = [str(place.path / "latents.npz"), "--first_stage", str(place.stage), "-o", "decoded"]
    return ["decode", *files, "--batch_size", "64"]


def sets(place: Place) -> list[str]:
    images = np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), np.uint8)
    np.savez(place.path / "set.npz", images)
    files = [str(place.model), str(place.path / "set.npz"), "--cache", "cache", "--results", "results.csv"]
    return ["evaluate", *files, "--metrics", "pixel-frechet", *MANY]


WORK = {
    "sample": (lambda p: ["sample", "-r", str(p.model), "-l", "out", *MANY], "lower --batch_size"),
    "warm-up": (warm_up, "lower distill.batch_size, distill.warmup.batch_size"),
    "train": (training, "lower data.batch_size"),
    "train-first-stage": (stage, "lower data.batch_size"),
    "evaluate": (sets, "lower --batch_size"),
    "decode": (decoding, "lower --batch_size"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    place = Place(tmp_path_factory.mktemp("memory"))
    lines = [[ROOM, *write(place)] for write, _ in WORK.values()]
    lines.append(["5", "convert", str(place.model), "copy", "--to", "folder"])
    return dict(zip([*WORK, "convert"], outcomes(commands, place.path, lines), strict=True))


@pytest.mark.parametrize("name", WORK)
def test_work_without_memory_ends_in_one_line_that_names_the_batch_size(name: str, found: dict[str, Outcome]) -> None:
    outcome = found[name]
    assert outcome.code == 2, outcome.printed[-2000:]
    errors = [line for line in outcome.printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in outcome.printed
    assert errors[0].startswith("error: out of memory (") and WORK[name][1] in errors[0]


def test_a_whole_file_that_memory_does_not_hold_is_not_called_damaged(found: dict[str, Outcome]) -> None:
    assert found["convert"].code == 2 and "out of memory" in found["convert"].printed
    assert "complete?" not in found["convert"].printed and "batch_size" not in found["convert"].printed


def test_numbers_that_no_memory_holds_are_damage() -> None:
    for text in ("Storage size calculation overflowed", "overflow computing buffer size from shape"):
        error = unreadable("x.pt", "not readable", RuntimeError(text))
        assert type(error) is UserError and str(error) == "x.pt: not readable"
    assert isinstance(unreadable("x.pt", "not readable", SafetensorError("Cannot allocate memory (12)")), OutOfMemory)


def raising(error: Exception) -> object:
    def fail(*arguments: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["pickle", "pool"])
def test_a_resume_without_memory_leaves_its_newest_checkpoint(
    where: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_config(teacher_folder, tmp_path, "run", trainer={"max_steps": 2}, logging={"save_every": 1})
    assert distil("--base", base) == 0
    run = tmp_path / "logs" / "run"
    before = contents(run / "checkpoints")
    if where == "pickle":
        monkeypatch.setattr(PickleShape, "read", raising(MemoryError()))
    else:
        monkeypatch.setattr(resuming, "read_safetensors", raising(SafetensorError("Cannot allocate memory (12)")))
    with pytest.raises(OutOfMemory, match="out of memory while it is read"):
        Choice(run / "checkpoints", pools=True)
    assert contents(run / "checkpoints") == before
    shutil.rmtree(run)
