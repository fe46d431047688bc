"""What cannot be meant in pixel space, and ends in one line and exit code 2."""

from pathlib import Path

import numpy as np
import pytest

from tests.cli import distil, run_script, sample
from tests.digits import distil_config, train
from tests.test_config_errors import assert_one_error_line


@pytest.fixture
def teacher(digits_teacher: Path) -> Path:
    return digits_teacher


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("student.params.out_channels=9", "out_channels: 9 must be 3 or 6"),
        ("student.params.num_classes=11", "num_classes: 11 differs from the teacher's 10"),
        ("student.params.image_size=16", "image_size: 16 differs"),
        ("first_stage.ckpt=models/x", "first_stage: pixel space has none"),
        ("distill.discard=1", "distill.discard: must be below 1"),
        ("distill.variant=random", "distill.variant: 'random' is not one of"),
        ("distill.rho=null", "distill.rho: missing"),
        ("teacher.guidance=2", "teacher.null_label: guidance needs"),
        ("teacher.null_label=99", "teacher.null_label: 99 is outside the network's table of 10"),
        ("distill.loss.space=v", "distill.loss.weight_cap: with space: v this schedule weights the last step"),
        ("teacher.use_ema=false", "teacher.use_ema"),
        ("student.init=elsewhere", "student.init: 'elsewhere' is neither"),
        ("trainer.accumulate=0", "trainer.accumulate: must be at least 1"),
        ("trainer.early_stop.monitor=fid", "trainer.early_stop.monitor: 'fid' is not one of"),
        ("trainer.early_stop.windows=3", "trainer.early_stop.windows: unknown key; did you mean 'window'"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_2(
    override: str, words: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distil("--base", distil_config(teacher, tmp_path, "bad"), override) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--first_stage", "models/vq"], "first_stage: pixel space has none"),
        (["first_stage.scale_factor=0.5"], "first_stage: pixel space has none"),
        (
            ["data.mix=replace"],
            "data.mix: replace needs real images and samples; set data.path and data.synthetic",
        ),
    ],
)
def test_a_training_refuses_what_has_no_effect(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8), arr_1=np.arange(8))
    assert train(tmp_path, "good", {"path": str(tmp_path / "x.npz")}, trainer={"max_steps": 1}) == 0
    for plan in ([], ["--plan"]):
        capsys.readouterr()
        code = run_script("train_ldm.py", "--base", tmp_path / "good.yaml", "logging.name=bad", *words, *plan)
        assert_one_error_line(capsys, code, (message,))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.arange(3), "int64 (3,), expected 4"),
        (np.eye(4, dtype=int), "int64 (4, 4), expected 4"),
        (np.full(4, 0.7), "float64 (4,), expected 4"),
        (np.array(["a"] * 4), "array arr_1: it holds str32, not numbers"),
        (np.arange(4) + 9, "labels go from 9 to 12"),
        (None, "needs labels"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(
    labels: np.ndarray | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8)} | ({} if labels is None else {"arr_1": labels})
    np.savez(tmp_path / "x.npz", **arrays)
    assert train(tmp_path, "bad", {"path": str(tmp_path / "x.npz")}) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--guidance", 2], "null_label: guidance needs"),
        (["--guidance", -1], "--guidance: must be at least 0"),
        (["--guidance", 1, 2], "--guidance: 2 weights for 1 models"),
        (["--sampler", "ddpm", "-e", 1], "--eta: has no effect with ddpm"),
    ],
)
def test_sampler_options_that_cannot_act_are_refused(
    arguments: list[object], words: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("-r", teacher, "-c", 4, *arguments) == 2
    assert words in capsys.readouterr().err


def test_labels_that_no_class_has_are_refused(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("-r", teacher, "-c", 4, "--labels", 10) == 2
    assert "--labels: 10 is not one of the model's 10 classes" in capsys.readouterr().err
