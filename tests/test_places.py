"""Where results cannot be written, a command says so by the flag before its work, and nothing is written."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli import contents, distil, run_script, sample, write_yaml
from tests.evaluate_sets import evaluate, evaluation_home, record, toy  # noqa: F401 (a fixture)
from tests.feature_sets import Toy
from tests.parts import VQ_PARAMS, distill_config
from tests.training_images import TRAINER

FEW = ("-n", 4, "-c", 2)
STUDENT = (*("-n", 65, "-c", 2), "--chains", 2, "--pairs", 2)


@pytest.fixture(autouse=True)
def locked(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which this user may not write, as root, who may, sees it."""
    Path("locked").mkdir()
    Path("file.png").touch()
    Path("folder.png").mkdir()
    allowed = os.access

    def access(path: Path, mode: int) -> bool:
        return not (mode & os.W_OK and "locked" in Path(path).parts) and allowed(path, mode)

    monkeypatch.setattr(os, "access", access)
    return Path("locked")


def refused(code: int, words: str, capsys: pytest.CaptureFixture[str], before: dict[str, bytes]) -> None:
    """One line names the flag; no work was done, and nothing is written."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1, error
    assert words in error and Toy.seen == 0
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare", "folder.png"], "--compare: folder.png is a folder; name a file in it"),
        (["--compare", "file.png/a.png"], "--compare: file.png/a.png: cannot be written; "),
        (["--compare", "locked/a.png"], "--compare: locked/a.png: cannot be written; no permission in "),
        (["-l", "file.png/a"], "-l: file.png is a file; name a folder"),
        (["-l", "locked/a"], "-l: locked/a: cannot be written; no permission in "),
        (["-l", "grids"], "-l: grids/grid.png is a folder; name a file in it"),
        (["-l", "images"], "-l: images/img is a file; name a folder"),
        (["-l", "other"], "-l: other/grid.png exists and does not hold a PNG image; name another file"),
        (["-l", "sums", "--npz"], "-l: sums/samples.npz exists and holds mu, sigma; name another folder"),
    ],
)
def test_samples(arguments: list[str], words: str, teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("grids/grid.png").mkdir(parents=True)
    Path("images").mkdir()
    Path("images/img").touch()
    for name in ("other", "sums"):
        Path(name).mkdir()
    Path("other/grid.png").write_text("no image")
    np.savez("sums/samples.npz", mu=np.zeros(2), sigma=np.eye(2))
    before = contents(Path())
    refused(sample("-r", teacher_folder, *FEW, *arguments), words, capsys, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache", "file.png"], "--cache: file.png is a file; name a folder"),
        (["--cache", "file.png/a"], "--cache: file.png is a file; name a folder"),
        (["--cache", "locked"], "--cache: locked: cannot be written; no permission in "),
        (["--cache", "locked/a"], "--cache: locked/a: cannot be written; no permission in "),
        (["--results", "file.png/r.csv"], "--results: file.png/r.csv: cannot be written; "),
        (["--results", "locked/r.csv"], "--results: locked/r.csv: cannot be written; no permission in "),
        (["-o", "locked/r.json"], "--out: locked/r.json: cannot be written; no permission in "),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_figures(
    alone: bool, arguments: list[str], words: str, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(Path())
    if alone:
        models = ("-r", shutil.copytree(teacher_folder, "student"), "--teacher", teacher_folder)
        before = contents(Path())
        refused(evaluate(*models, *STUDENT, *arguments), words, capsys, before)
    else:
        refused(toy("a.npz", "b.npz", "--metrics", "fd", "pixel-frechet", *arguments), words, capsys, before)


def test_a_cache_that_holds_all_may_be_read_only(locked: Path) -> None:
    asked = ("a.npz", "b.npz", "--metrics", "fd", "--cache")
    assert toy(*asked, "cache") == 0
    locked.rmdir()
    Path("cache").rename(locked)
    assert toy(*asked, "locked", "-o", "out.json") == 0 and record()["figures"]["FD-toy"] > 0


def test_figures_beside_a_model_have_a_flag_for_another_place(
    teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("locked/run")
    student = shutil.copytree(teacher_folder, run / "student")
    write_yaml(run / "config.yaml", distill_config(teacher_folder, Path("logs")))
    before, words = contents(Path()), "cannot be written; no permission in "
    for name, code in (
        ("evaluation.json", lambda: evaluate("-r", student, *STUDENT)),
        ("evaluations", lambda: toy(student, "b.npz", *FEW, "--metrics", "fd")),
    ):
        refused(code(), f"{student}/{name}: {words}", capsys, before)
        assert code() == 2 and "name a file for the figures with -o" in capsys.readouterr().err
    assert toy(student, "b.npz", *FEW, "--metrics", "fd", "-o", "out.json") == 0 and record()["figures"]


def test_latents_models_and_pages(
    teacher_folder: Path, first_stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("latents.npz", torch.zeros(1, 3, 8, 8).numpy())
    write_yaml(Path("run/config.yaml"), distill_config(teacher_folder, tmp_path))
    before = contents(Path())
    words = "cannot be written; no permission in "
    decoding = ("decode_latents.py", "latents.npz", "--first_stage", first_stage, "-o")
    refused(run_script(*decoding, "locked/a"), f"--out: locked/a: {words}", capsys, before)
    refused(run_script("convert.py", teacher_folder, "locked/a", "--to", "safetensors"), words, capsys, before)
    refused(run_script("report.py", "run", "-o", "locked/a.html"), f"-o: locked/a.html: {words}", capsys, before)


@pytest.mark.parametrize("kind", ["distill", "train", "first stage"])
def test_runs(kind: str, teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"dir": "locked", "name": "x"}
    if kind == "distill":
        tree, script = distill_config(teacher_folder, Path("locked"), logging=logs), "dkdm_ldm.py"
    else:
        tree = {"trainer": TRAINER, "logging": logs, "data": {"path": "a.npz", "image_size": 32, "batch_size": 8}}
        tree["first_stage"] = {"target": "ldm_dkdm.first_stage.VQModel", "params": VQ_PARAMS}
        script = "train_first_stage.py"
    if kind == "train":
        params = {"image_size": 32, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1}
        params |= {"channel_mult": [1], "attention_resolutions": [], "num_heads": 1}
        tree["model"] = {"target": "ldm_dkdm.networks.UNet", "params": params}
        tree["diffusion"] = {"space": "pixel", "num_timesteps": 20, "schedule": "linear"}
        del tree["first_stage"]
        script = "train_ldm.py"
    write_yaml(Path("c.yaml"), tree)
    before = contents(Path())
    words = "locked/x: cannot be written; no permission in "
    code = distil("--base", "c.yaml") if kind == "distill" else run_script(script, "--base", "c.yaml")
    refused(code, words, capsys, before)


def test_files_of_other_kinds_and_inputs_are_not_written_over(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml(Path("run/config.yaml"), distill_config(teacher_folder, tmp_path))
    Path("notes.txt").write_text("one line\n")
    Path("photo.png").write_bytes(b"\xff\xd8\xff and so on")
    asked = ("--metrics", "fd", "--save_statistics", "b_statistics.npz", "-o", "out.json")
    assert toy("b.npz", "a.npz", *asked) == 0
    shutil.rmtree("logs", ignore_errors=True)
    Toy.seen = 0
    before = contents(Path())
    sets, statistics = ("a.npz", "b.npz", "--metrics", "fd"), ("a.npz", "b_statistics.npz", "--metrics", "fd")
    student = ("-r", teacher_folder, "--teacher", teacher_folder, *STUDENT)
    capsys.readouterr()
    for call, words in (
        (lambda: toy(*sets, "-o", "a.npz"), "--out: a.npz is read by this call; name another file"),
        (
            lambda: toy(*sets, "-o", "notes.txt"),
            "--out: notes.txt exists and does not hold figures of two sets; name another",
        ),
        (
            lambda: evaluate(*student, "-o", "out.json"),
            "--out: out.json exists and does not hold figures of a student (-r);",
        ),
        (lambda: toy(*sets, "--results", "notes.txt"), "notes.txt: is not a CSV file of results"),
        (
            lambda: toy(*sets, "-o", "new.csv", "--results", "new.csv"),
            "--results: new.csv is also written as --out; name",
        ),
        (
            lambda: toy(*statistics, "--save_statistics", "b_statistics.npz"),
            "--save_statistics: b_statistics.npz is read by",
        ),
        (
            lambda: evaluate("out.json", "--table", "-o", "out.json"),
            "--out: out.json exists and does not hold a table of ",
        ),
        (
            lambda: run_script("report.py", "run", "-o", "run/config.yaml"),
            "-o: run/config.yaml exists and does not hold an HT",
        ),
        (
            lambda: sample("-r", teacher_folder, *FEW, "--compare", "photo.png"),
            "photo.png exists and does not hold a PNG imag",
        ),
        (
            lambda: sample("-r", teacher_folder, *FEW, "-l", "x", "--compare", "x/grid.png"),
            "--compare: x/grid.png is also written as the grid of -l; name another file",
        ),
        (
            lambda: sample("-r", teacher_folder, *FEW, "-l", "x", "--compare", "x/img/a.png"),
            "x/img/a.png is among the images",
        ),
    ):
        refused(call(), words, capsys, before)


def test_earlier_outputs_of_the_same_kind_are_written_over(teacher_folder: Path, tmp_path: Path) -> None:
    write_yaml(Path("run/config.yaml"), distill_config(teacher_folder, tmp_path))
    for other in ("b.npz", "a.npz"):
        assert toy("a.npz", other, "--metrics", "fd", "-o", "out.json", "--results", "r.csv") == 0
        assert evaluate("out.json", "--table", "-o", "t.md") == 0
        assert run_script("report.py", "run", "-o", "page.html") == 0
        assert sample("-r", teacher_folder, *FEW, "-l", "x", "--compare", "c.png") == 0
    assert record()["reference"]["source"] == "a.npz"
