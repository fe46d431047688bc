"""Agreement of a student with its teacher: closed forms, and what a training does with it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, evaluate, load_model
from ldm_dkdm.config.schema import EarlyStopConfig
from ldm_dkdm.evaluation import reference
from ldm_dkdm.evaluation.agreement import Sizes, agreement, new_reference, teacher_calls
from ldm_dkdm.evaluation.reference import read_reference, save_reference
from ldm_dkdm.training import agreement_callback
from ldm_dkdm.training.ends import EarlyStop
from tests.cli import contents, distil, table, write_yaml
from tests.parts import UNET_PARAMS, distill_config
from tests.training_images import LOGGING, TRAINER, training_images

FEW = Sizes(chains=1, images=2, steps=1)


class Constant(nn.Module):
    """Predicts one eps everywhere."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(eps))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.eps.expand_as(x)


def model(eps: float, like: DiffusionModel) -> DiffusionModel:
    return DiffusionModel(Constant(eps), like=like)


@pytest.mark.parametrize("total", [1, 2, 20, 30])
def test_a_constant_error_has_the_closed_form(total: int, teacher_folder: Path) -> None:
    like = DiffusionModel(
        Constant(0.0), like=load_model(teacher_folder), schedule=NoiseSchedule(num_timesteps=total, steps_offset=0)
    )
    c, abar = 0.3, like.schedule.alphas_cumprod.double().numpy()
    figures = agreement(model(c, like), new_reference(like, seed=0))
    quarters = {f"agreement_q{1 + 4 * t // total}" for t in range(total)}
    squares = {name: value for name, value in figures.items() if name.startswith("agreement")}
    assert squares == pytest.approx(dict.fromkeys({"agreement", *quarters}, c**2), rel=1e-5)
    stride = total // min(20, total)
    difference, drifts = 0.0, []  # between the chains, which begin with the same noise
    for t in reversed(range(0, total, stride)):
        drifts.append((difference - math.sqrt(1 - abar[t]) * c) / math.sqrt(abar[t]))
        following = abar[t - stride] if t >= stride else 1.0
        difference = math.sqrt(following) * drifts[-1] + math.sqrt(1 - following) * c
    assert figures["x0_drift"] == pytest.approx(np.mean(np.square(drifts)), rel=1e-4)


@pytest.mark.parametrize("sizes", [None, Sizes(chains=1, images=5, steps=3)])  # 3 steps in 20 are spaced as 4
def test_the_teacher_agrees_with_itself(sizes: Sizes | None, teacher_folder: Path) -> None:
    teacher = load_model(teacher_folder)
    figures = agreement(teacher, new_reference(teacher, 3, sizes, batch_size=3))
    assert figures["agreement"] < 1e-9 and figures["x0_drift"] < 1e-9
    assert figures["psnr"] == 100 and figures["ssim"] == pytest.approx(1)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of one channel in [0,1] (Wang et al. 2004, Eq. 13), windows of 11 pixels, mirrored borders."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5, mode="mirror")

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return (((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


def test_psnr_and_ssim_are_those_of_the_images_that_sampling_gives(teacher_folder: Path) -> None:
    teacher = load_model(teacher_folder)
    student = teacher.student(teacher.node, seed=5)
    known = new_reference(teacher, 1, Sizes(chains=1, images=5, steps=4))
    figures = agreement(student, known)
    ours, theirs = (m.sample(5, steps=4, seed=known.seed).double().numpy() / 255 for m in (student, teacher))
    psnr = [min(100, -10 * math.log10(1e-20 + np.mean((a - b) ** 2))) for a, b in zip(ours, theirs, strict=True)]
    assert figures["psnr"] == pytest.approx(np.mean(psnr), rel=1e-4)
    pairs = [(a[..., c], b[..., c]) for a, b in zip(ours, theirs, strict=True) for c in range(3)]
    assert figures["ssim"] == pytest.approx(np.mean([ssim(a, b) for a, b in pairs]), abs=1e-4)


def test_a_reference_is_read_for_the_same_facts_only(teacher_folder: Path, tmp_path: Path) -> None:
    teacher, file = load_model(teacher_folder), tmp_path / "a.safetensors"
    known = new_reference(teacher, 1, FEW)
    save_reference(known, file, {"teacher_sha256": "a"})
    again = read_reference(file, {"teacher_sha256": "a"})
    assert again is not None and torch.equal(again.states.eps, known.states.eps) and again.seed == known.seed
    assert agreement(teacher, again) == agreement(teacher, known)
    assert read_reference(file, {"teacher_sha256": "b"}) is None
    infinite = replace(known, states=replace(known.states, eps=known.states.eps / 0))  # as older versions kept it
    save_reference(infinite, file, {"teacher_sha256": "a"})
    assert read_reference(file, {"teacher_sha256": "a"}) is None
    save_reference(known, file, {"teacher_sha256": "a"})
    file.write_bytes(file.read_bytes()[:100])
    assert read_reference(file, {"teacher_sha256": "a"}) is None


def test_the_next_student_of_a_teacher_takes_no_chains(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, walks = load_model(teacher_folder), []
    walk = reference.new_reference
    monkeypatch.setattr(reference, "new_reference", lambda *given, **named: (walks.append(1), walk(*given, **named))[1])
    options = {"images": 0, "chains": 1, "pairs": 1, "steps": 1}
    students = [teacher.student(teacher.node, seed=seed) for seed in (5, 6)]
    fresh = [evaluate(student, teacher, cache=tmp_path / str(i), **options) for i, student in enumerate(students)]
    assert len(walks) == 2
    caplog.set_level("INFO", logger="ldm_dkdm")
    assert evaluate(students[1], teacher, cache=tmp_path / "0", **options) == fresh[1]
    assert len(walks) == 2 and "chains and images of the teacher are reused: " in caplog.text
    for other in ({"seed": 1}, {"chains": 2}, {"pairs": 2}, {"steps": 2}):
        evaluate(students[1], teacher, cache=tmp_path / "0", **options | other)
    evaluate(students[1], students[0], cache=tmp_path / "0", **options)  # another teacher
    assert len(walks) == 7
    for file in (tmp_path / "0").iterdir():
        file.write_bytes(file.read_bytes()[:-4])
    assert evaluate(students[1], teacher, cache=tmp_path / "0", **options) == fresh[1]
    assert len(walks) == 8
    (tmp_path / "file").touch()  # no folder can be made below it
    assert evaluate(students[1], teacher, cache=tmp_path / "file" / "cache", **options) == fresh[1]
    assert "chains and images of the teacher are not kept" in caplog.text


def run(teacher: Path, folder: Path, name: str, *changes: str, **sections: dict[str, object]) -> int:
    config = distill_config(teacher, folder, **sections)
    config["logging"]["name"] = name
    return distil("--base", write_yaml(folder / f"{name}.yaml", config), *changes)


@pytest.mark.usefixtures("few_images")
def test_measuring_changes_nothing_in_the_training_and_a_resume_asks_the_teacher_no_more(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = distill_config(teacher_folder, tmp_path)["student"]
    student["params"]["dropout"] = 0.1
    for name, every in (("off", 0), ("on", 2), ("halves", 2)):
        steps = 2 if name == "halves" else 4
        log = {"evaluate_every": every, "log_every": 1, "sample_every": 99}
        assert run(teacher_folder, tmp_path, name, student=student, trainer={"max_steps": steps}, logging=log) == 0
    monkeypatch.setattr(agreement_callback, "new_reference", lambda *args, **options: pytest.fail("called again"))
    assert distil("--resume", tmp_path / "halves", "trainer.max_steps=4") == 0
    off, on, halves = (contents(tmp_path / name) for name in ("off", "on", "halves"))
    assert off["student/student.safetensors"] == on["student/student.safetensors"]
    assert on["student/student.safetensors"] == halves["student/student.safetensors"]
    assert "agreement.safetensors" not in off and on["agreement.safetensors"] == halves["agreement.safetensors"]
    rows = {name: table(tmp_path / name / "metrics.csv") for name in ("off", "on", "halves")}
    timed = ("seconds", "steps_per_second")
    plain = [[{k: v for k, v in row.items() if k not in timed} for row in rows[name]] for name in ("on", "halves")]
    assert plain[0] == plain[1]
    assert [row["loss"] for row in rows["off"]] == [row["loss"] for row in rows["on"]]
    assert [row["step"] for row in rows["on"] if row["agreement"]] == ["2", "4"]
    final = agreement(load_model(tmp_path / "on"), new_reference(load_model(teacher_folder), seed=0))
    assert {name: float(rows["on"][-1][name]) for name in final} == pytest.approx(final, rel=1e-4)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Agreements that the measurements find, in order."""
    figures: list[float] = []
    monkeypatch.setattr(
        agreement_callback, "agreement", lambda *args: dict.fromkeys(("agreement", "x0_drift"), figures.pop(0))
    )
    yield figures
    assert figures == []


def files(folder: Path, suffix: str) -> list[int]:
    return [int(f.name[5:13]) for f in sorted((folder / "checkpoints").glob(f"step=*{suffix}"))]


def test_the_best_checkpoint_stays_and_is_the_student(teacher_folder: Path, tmp_path: Path, given: list) -> None:
    given += [3.0, 1.0, 2.0, 4.0]
    log = {"evaluate_every": 1, "save_every": 3, "keep_best": True, "sample_every": 99}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 4}, logging=log) == 0
    folder = tmp_path / "run"
    assert files(folder, ".ckpt") == [2, 3, 4] and files(folder, ".pool-rank0.safetensors") == [3, 4]
    best = load_model(folder / "checkpoints" / "step=00000002.ckpt")
    student = load_model(folder)
    assert student.info["step"] == 2
    names = student.network.state_dict().keys()
    assert all(torch.equal(student.network.state_dict()[n], best.network.state_dict()[n]) for n in names)
    given += [0.5, 0.7]
    assert distil("--resume", folder, "trainer.max_steps=6") == 0
    assert load_model(folder).info["step"] == 5 and files(folder, ".ckpt") == [5, 6]


def test_an_early_stop_by_the_loss_leaves_the_best_agreement(teacher_folder: Path, tmp_path: Path, given: list) -> None:
    given += [1.0, 2.0, 3.0]
    log = {"evaluate_every": 1, "save_every": 2, "keep_best": True, "sample_every": 99}
    stop = {"monitor": "loss", "window": 1, "patience": 100}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 3, "early_stop": stop}, logging=log) == 0
    assert load_model(tmp_path / "run").info["step"] == 1


def test_checkpoints_at_multiples_stay(teacher_folder: Path, tmp_path: Path) -> None:
    log = {"save_every": 3, "keep_every": 2, "sample_every": 99}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 9}, logging=log) == 0
    assert files(tmp_path / "run", ".ckpt") == [2, 4, 6, 8, 9]
    assert files(tmp_path / "run", ".pool-rank0.safetensors") == [8, 9]


def test_a_run_stops_when_the_agreement_no_longer_improves(teacher_folder: Path, tmp_path: Path, given: list) -> None:
    given += [3.0, 2.0, 2.5, 2.1]
    trainer = {"max_steps": 40, "early_stop": {"monitor": "agreement", "patience": 2}}
    log = {"evaluate_every": 1, "sample_every": 99}
    assert run(teacher_folder, tmp_path, "run", trainer=trainer, logging=log) == 0
    assert files(tmp_path / "run", ".ckpt")[-1] == 4
    assert load_model(tmp_path / "run").info["step"] == 2


def test_the_drift_of_x_0_judges_where_it_is_asked_to(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(4.0, 1.0), (3.0, 0.5), (2.0, 0.7), (1.0, 0.8)]  # agreement, drift
    measured = iter([{"agreement": a, "x0_drift": drift} for a, drift in found * 2 + found[3:]])
    monkeypatch.setattr(agreement_callback, "agreement", lambda *args: next(measured))
    quiet = {"evaluate_every": 1, "save_every": 99, "sample_every": 99}
    log = {**quiet, "keep_best": True, "best_by": "x0_drift"}
    assert run(teacher_folder, tmp_path, "best", trainer={"max_steps": 4}, logging=log) == 0
    assert load_model(tmp_path / "best").info["step"] == 2
    stop = {"max_steps": 40, "early_stop": {"monitor": "x0_drift", "patience": 2}}
    assert run(teacher_folder, tmp_path, "stop", trainer=stop, logging=quiet) == 0
    assert files(tmp_path / "stop", ".ckpt")[-1] == 4 and load_model(tmp_path / "stop").info["step"] == 2
    changes = ("trainer.max_steps=5", "logging.best_by=agreement")  # 0.5, of the drift, says nothing of agreements
    assert distil("--resume", tmp_path / "best", *changes) == 0
    assert load_model(tmp_path / "best").info["step"] == 5
    stopped = EarlyStop(EarlyStopConfig(monitor="x0_drift"))
    stopped.load_state_dict({**EarlyStop(EarlyStopConfig(monitor="agreement")).state_dict(), "best": 0.01})
    assert stopped.best == math.inf


def test_a_measurement_that_fails_does_not_end_the_run(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement_callback, "agreement", lambda *args: 1 / 0)
    log = {"evaluate_every": 1, "sample_every": 99}
    assert run(teacher_folder, tmp_path, "run", trainer={"max_steps": 2}, logging=log) == 0
    assert "agreement: left out (ZeroDivisionError" in capsys.readouterr().err
    assert load_model(tmp_path / "run").info["step"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["logging.keep_best=true"], "logging.keep_best: needs the agreement, which evaluate_every: 0 switches off"),
        (["logging.best_by=agreement"], "logging.best_by: has no effect without keep_best: true"),
        (["trainer.early_stop={monitor: agreement}"], "trainer.early_stop.monitor: needs the agreement"),
        (["trainer.early_stop={monitor: agreement, window: 5}"], "trainer.early_stop.window: has no effect"),
        (["logging.loggers=[csv, tensorbord]"], "'tensorbord' is not one of csv, tensorboard, wandb"),
    ],
)
def test_keys_that_have_no_effect_are_refused(
    changes: list[str], words: str, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(teacher_folder, tmp_path, "run", *changes) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["keep_best", "evaluate_every"])
def test_a_training_on_images_has_no_teacher_to_agree_with(key: str, first_stage: Path, tmp_path: Path) -> None:
    like = DiffusionModel(
        dkdm.networks.UNet(**UNET_PARAMS), schedule=NoiseSchedule(num_timesteps=20), first_stage=first_stage
    )
    numbers = {"steps": TRAINER["max_steps"], "batch_size": 4, **LOGGING, key: 1 if key == "evaluate_every" else True}
    with pytest.raises(UserError, match=f"^{key}: needs a teacher to agree with"):
        dkdm.train(like, training_images(tmp_path), tmp_path / "run", progress=False, **numbers)
    assert not (tmp_path / "run").exists() and teacher_calls(1000) == 4 * 1000 + 16 * 20
