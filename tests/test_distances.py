"""Distances of a student and its teacher without data: those of `measure`; streamed, cached, resumed."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, evaluate, measure
from ldm_dkdm.evaluation import frechet, partial
from ldm_dkdm.model.sampling import SampleBatch
from ldm_dkdm.networks import UNet
from ldm_dkdm.records import Prediction
from tests.cli import run_script
from tests.parts import UNET_PARAMS, randomised

COUNT = 150
SIZES = {"images": COUNT, "chains": 1, "pairs": 1, "steps": 1, "batch_size": 32, "seed": 7}


def pixel(seed: int) -> DiffusionModel:
    network = randomised(UNet(**UNET_PARAMS))
    with torch.no_grad():
        next(network.parameters()).add_(seed)
    return DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=8), space="pixel")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[DiffusionModel, DiffusionModel]:
    """A student and a teacher, with components of 70 images at most."""
    monkeypatch.setattr(frechet, "IMAGES", 70)
    return pixel(0), pixel(1)


def counted(model: DiffusionModel, fail_at: int | None = None) -> list[int]:
    """The batches that a model is called with from now on; one of them may be a failure.

    A hook of the network would count too, but the cache tells a network with hooks from one without.
    """
    seen: list[int] = []
    call = model._call

    def count(x: torch.Tensor, *others: torch.Tensor | None) -> Prediction:
        seen.append(len(x))
        if len(seen) == fail_at:
            raise KeyboardInterrupt
        return call(x, *others)

    model._call = count
    return seen


def test_the_distances_are_those_of_measure_and_of_images_in_memory(
    models: tuple[DiffusionModel, DiffusionModel], tmp_path: Path
) -> None:
    student, teacher = models
    found = evaluate(student, teacher, cache=tmp_path / "a", **SIZES)
    numbers = {"count": COUNT, "steps": 1, "seed": 7, "batch_size": 32}
    drawn = teacher.sample(COUNT, steps=1, seed=7 + COUNT)
    basis = frechet.PixelBasis.of(drawn[:70])
    for name, model in (("student", student), ("teacher", teacher)):
        figure = found[f"frechet_{name}_to_teacher"]
        other = measure(model, teacher, metrics=["pixel-frechet"], cache=tmp_path / name, **numbers)
        assert figure == other.figures["pixel Frechet"] > 0
        a, b = (basis.project(images) for images in (drawn, model.sample(COUNT, steps=1, seed=7)))
        moments = (torch.from_numpy(x) for x in (a, b))
        wanted = frechet.frechet_distance(*(part for x in moments for part in (x.mean(0).numpy(), x.T.cov().numpy())))
        assert figure == pytest.approx(wanted, rel=1e-6)
        assert found[f"{name}_images_per_second"] > 0


def test_a_second_call_draws_nothing_and_has_no_speed(
    models: tuple[DiffusionModel, DiffusionModel], tmp_path: Path
) -> None:
    student, teacher = models
    first = evaluate(student, teacher, cache=tmp_path, **SIZES)
    seen = counted(student), counted(teacher)
    second = evaluate(student, teacher, cache=tmp_path, **SIZES)
    assert all(sum(batches) < COUNT for batches in seen)  # the agreement's calls alone
    assert {**second, **{n: first[n] for n in first if n.endswith("_per_second")}} == first
    assert not any(name.endswith("_per_second") for name in second)
    kept = measure(student, teacher, metrics=["pixel-frechet"], count=COUNT, steps=1, seed=7, cache=tmp_path)
    assert kept.figures["pixel Frechet"] == first["frechet_student_to_teacher"]
    assert not list(tmp_path.glob("*.partial.npz"))


def test_images_are_not_kept(
    models: tuple[DiffusionModel, DiffusionModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, seen = [0], []
    whole = DiffusionModel.sample_batches

    def gone(count: int) -> None:
        alive[0] -= count

    def watched(*given: object, **named: object) -> Iterator[SampleBatch]:
        for batch in whole(*given, **named):
            alive[0] += len(batch.images)
            weakref.finalize(batch.images, gone, len(batch.images))
            seen.append(alive[0])
            yield batch

    monkeypatch.setattr(DiffusionModel, "sample_batches", watched)
    evaluate(*models, cache=tmp_path, **SIZES)
    assert len(seen) >= 3 * 5 and max(seen) <= 2 * 32


def test_a_stopped_call_goes_on_with_its_sums(
    models: tuple[DiffusionModel, DiffusionModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = evaluate(pixel(0), pixel(1), cache=tmp_path / "whole", **SIZES)
    _, teacher = models
    teachers = counted(teacher)
    agreeing = len(_calls(lambda model: evaluate(model, teacher, **{**SIZES, "images": 0})))
    stopping = pixel(0)
    monkeypatch.setattr(partial, "time", _Later())
    seen = counted(stopping, fail_at=agreeing + 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopping, teacher, cache=tmp_path / "parts", **SIZES)
    assert sum(seen[agreeing:-1]) == 3 * 32
    assert max(teachers) == 32  # batches of the teacher's images
    teachers.clear()
    going_on = pixel(0)
    seen = counted(going_on)
    found = evaluate(going_on, teacher, cache=tmp_path / "parts", **SIZES)
    assert sum(seen[agreeing:]) == COUNT - 3 * 32 and max(teachers, default=0) < 32  # no image of the teacher
    for name in ("frechet_student_to_teacher", "frechet_teacher_to_teacher"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-9)


class _Later:
    """A clock that a minute passes on between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 61
        return self.now


def _calls(work: Callable[[DiffusionModel], object]) -> list[int]:
    model = pixel(0)
    seen = counted(model)
    work(model)
    return seen


def test_the_command_takes_a_cache_that_the_metric_finds(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    numbers = ("-n", 65, "-c", 1, "--cache", tmp_path / "cache", "--results", tmp_path / "r.csv")
    student = ("-r", teacher_folder, "--teacher", teacher_folder)
    assert run_script("evaluate.py", *student, "--chains", 1, "--pairs", 1, *numbers, "-o", "alone.json") == 0
    capsys.readouterr()
    sets = (teacher_folder, teacher_folder, "--metrics", "pixel-frechet")
    assert run_script("evaluate.py", *sets, *numbers, "-o", "metric.json") == 0
    assert capsys.readouterr().out.count("are reused") == 2
    alone, metric = (json.loads(Path(name).read_text()) for name in ("alone.json", "metric.json"))
    assert alone["frechet_student_to_teacher"] == metric["figures"]["pixel Frechet"]
    chains = ("--chains", 1, "--pairs", 1, "-n", 0, "--cache", tmp_path / "cache", "--results", tmp_path / "r.csv")
    assert run_script("evaluate.py", *student, *chains, "-c", 1) == 0  # the chains of the first call are there
    assert "chains and images of the teacher are reused" in capsys.readouterr().out
    with pytest.raises(UserError, match="images: at least 65"):
        evaluate(pixel(0), pixel(1), images=64, cache=tmp_path / "new")
    assert not (tmp_path / "new").exists()
