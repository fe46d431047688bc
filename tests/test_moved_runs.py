"""Runs that were moved find their parts; a teacher that changed, or that a run would overwrite, is refused."""

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from ldm_dkdm import load_model
from ldm_dkdm.checkpoints.model_folder import card_of, write_model
from ldm_dkdm.commands.evaluate import find_teacher
from ldm_dkdm.commands.hints import ScopedHints
from ldm_dkdm.npz import save_npz
from ldm_dkdm.training.finding import located
from tests.cli import contents, distil, run_script, sample, write_yaml
from tests.parts import UNET_PARAMS, VQ_PARAMS, first_stage_folder, model_folder
from tests.test_config_errors import assert_one_error_line
from tests.test_resume import QUIET, result, write_config
from tests.training_images import LOGGING, TRAINER, training_images


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/teacher, models/vq and logs/run, whose config has relative paths."""
    home = tmp_path_factory.mktemp("project")
    load_model(model_folder(home / "first", first_stage_folder(home / "models" / "vq"))).save(home / "models/teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        base = write_config(Path("models/teacher"), Path(), "run", trainer={"max_steps": 2})
        assert distil("--base", base) == 0
    return home


def project(built: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in; returns the run."""
    shutil.copytree(built, home, dirs_exist_ok=True)
    for card in home.rglob("config.yaml"):
        card.write_text(card.read_text().replace(str(built), str(home)))
    monkeypatch.chdir(home)
    return home / "logs" / "run"


def test_a_moved_run_finds_its_teacher_and_its_first_stage(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project(built, tmp_path / "home", monkeypatch)
    alone = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run"))
    assert load_model(alone).codec().latent_size == 8  # by the path from the root
    (tmp_path / "home").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "new" / "logs" / "run"
    assert load_model(run).codec().latent_size == 8  # by the path relative to the model
    (tmp_path / "link").symlink_to(run)
    for found in (run, tmp_path / "link"):
        assert load_model(found).codec().latent_size == 8
        teacher = find_teacher(found, None, ScopedHints([], ("student", "teacher")))
        assert teacher.path == tmp_path / "new" / "models" / "teacher"
    assert distil("--resume", tmp_path / "link", "trainer.max_steps=3") == 0
    assert located("models/teacher", run) == str(tmp_path / "new" / "models" / "teacher")
    assert located("/models/teacher", run) == "/models/teacher" and located("no", run) == "no"


def test_a_teacher_that_changed_since_the_run_began_is_refused(
    built: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    run = project(built, tmp_path, monkeypatch)
    weights = tmp_path / "models" / "teacher" / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    other = load_model("models/teacher")
    next(other.network.parameters()).data.add_(1)
    write_model(weights.parent, card_of(other, weights.parent), other.network.state_dict())
    now = hashlib.sha256(weights.read_bytes()).hexdigest()
    kept = contents(run / "student")
    code = distil("--resume", run, "trainer.max_steps=4")
    assert_one_error_line(capsys, code, ("teacher: ", f"was {before}", f"is {now}", "put the old file back"))
    assert contents(run / "student") == kept


def test_a_teacher_of_another_process_is_refused_although_its_weights_are_the_same(
    built: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    run, card = project(built, tmp_path, monkeypatch), tmp_path / "models" / "teacher" / "config.yaml"
    card.write_text(card.read_text().replace("beta_end: 0.0195", "beta_end: 0.03"))
    code = distil("--resume", run, "trainer.max_steps=4")
    assert_one_error_line(capsys, code, ("teacher: ", "its diffusion.beta_end was 0.0195 and is 0.03;"))


def test_a_run_does_not_replace_its_teacher(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = project(built, tmp_path, monkeypatch)
    (run / "config.yaml").unlink()
    before = contents(run)
    base = write_config(Path("logs/run"), Path(), "run")
    assert_one_error_line(
        capsys, distil("--base", base), ("teacher: logs/run/student is in the run folder", "logging.name=NEW")
    )
    assert contents(run) == before


def test_commands_take_a_first_stage(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = project(built, tmp_path, monkeypatch)
    shutil.move(tmp_path / "models" / "vq", tmp_path / "vq")
    stage = ["--first_stage", tmp_path / "vq"]
    assert sample("-r", run, "-n", 1, "-c", 2, "-l", tmp_path / "out") == 2
    assert run_script("convert.py", run, tmp_path / "copy", "--to", "folder") == 2
    assert run_script("evaluate.py", "-r", run, "-n", 0, "--chains", 1) == 2
    assert [line[:22] for line in capsys.readouterr().err.splitlines()] == ["error: --first_stage: "] * 3
    assert sample("-r", run, "-n", 1, "-c", 2, "-l", tmp_path / "out", *stage) == 0
    assert run_script("convert.py", run, tmp_path / "copy", "--to", "folder", *stage) == 0
    assert load_model(tmp_path / "copy").codec().latent_size == 8
    assert distil("--resume", run, *stage, "trainer.max_steps=3") == 0
    figures = ["-n", 0, "--chains", 1, "--pairs", 1, "-c", 1]
    assert run_script("evaluate.py", "-r", run, *figures, *stage) == 0


@pytest.mark.parametrize("metrics", [[], ["--metrics", "agreement"]])
def test_an_evaluation_of_a_run_whose_teacher_is_gone_names_the_flag_for_another(
    metrics: list[str], built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = project(built, tmp_path, monkeypatch)
    (tmp_path / "models" / "teacher").rename(tmp_path / "moved")
    options = [
        "-r",
        run,
        "--chains",
        1,
        "--pairs",
        1,
        "-c",
        1,
        "--cache",
        tmp_path / "c",
        "--results",
        "r.csv",
        *metrics,
    ]
    options += [] if metrics else ["-n", 0]
    words = (f"error: --teacher: the teacher of {run}: models/teacher: no such checkpoint file",)
    assert_one_error_line(capsys, run_script("evaluate.py", *options), words)
    assert run_script("evaluate.py", *options, "--teacher", "moved") == 0


IMAGES = ("pixel", "first stage")


SCRIPTS = {"pixel": "train_ldm.py", "first stage": "train_first_stage.py"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that makes a training on images.npz, by a relative path, once; returns the folder of logs/run."""
    return cache(lambda kind: train_on_images(kind, tmp_path_factory.mktemp("trained")))


def train_on_images(kind: str, home: Path) -> Path:
    training_images(home)
    config = {
        "data": {"path": "images.npz", "image_size": 32, "batch_size": 4},
        "trainer": {**TRAINER, "max_steps": 1},
        "logging": {**(LOGGING if kind == "pixel" else {}), "name": "run"},
    }
    config |= (
        {
            "model": {"target": "ldm_dkdm.networks.UNet", "params": {**UNET_PARAMS, "image_size": 32}},
            "diffusion": {"num_timesteps": 20, "space": "pixel"},
        }
        if kind == "pixel"
        else {"first_stage": {"target": "ldm_dkdm.first_stage.VQModel", "params": VQ_PARAMS}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert run_script(SCRIPTS[kind], "--base", write_yaml(home / "base.yaml", config)) == 0
    return home


@pytest.fixture
def home(trained: Callable[[str], Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its folder, to work in."""
    monkeypatch.chdir(shutil.copytree(trained(kind), tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("kind", IMAGES)
def test_a_run_finds_its_images_from_another_folder_and_where_they_moved(
    kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    script, run = SCRIPTS[kind], home / "logs" / "run"
    monkeypatch.chdir(tmp_path)
    assert run_script(script, "--resume", run, "trainer.max_steps=2") == 0
    (home / "images.npz").rename(tmp_path / "moved.npz")
    capsys.readouterr()
    code = run_script(script, "--resume", run, "trainer.max_steps=3")
    assert_one_error_line(capsys, code, ("data.path: ", "images.npz"))
    assert run_script(script, "--resume", run, "trainer.max_steps=3", "data.path=moved.npz") == 0
    monkeypatch.chdir(run)
    assert run_script(script, "--resume", run, "trainer.max_steps=4") == 0


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_are_not_those_of_the_run_are_refused(kind: str, home: Path, tmp_path: Path, capsys) -> None:
    script, run = SCRIPTS[kind], home / "logs" / "run"
    save_npz(torch.zeros(20, 32, 32, 3, dtype=torch.uint8), tmp_path / "other.npz")
    capsys.readouterr()
    code = run_script(script, "--resume", run, "trainer.max_steps=2", f"data.path={tmp_path / 'other.npz'}")
    assert_one_error_line(capsys, code, ("data.path: ", "other.npz: gives 20 images", "began with 24"))
    key = "data.synthetic" if kind == "pixel" else "data.held_out"
    code = run_script(script, "--resume", run, "trainer.max_steps=2", f"{key}={tmp_path / 'other.npz'}")
    assert_one_error_line(capsys, code, (f"{key}: cannot change",))


def test_a_run_goes_on_without_the_model_whose_weights_it_began_with(
    first_stage: Path, teacher_folder: Path, tmp_path: Path, capsys
) -> None:
    begin, runs = model_folder(tmp_path / "begin", first_stage, "v"), {}
    for name in ("whole", "run"):
        options = {"student": {"init": str(begin)}, "trainer": {"max_steps": 2}, **QUIET}
        base = write_config(teacher_folder, tmp_path, name, **options)
        steps = 2 if name == "whole" else 1
        assert distil("--base", base, f"trainer.max_steps={steps}") == 0
        runs[name] = tmp_path / "logs" / name
    shutil.rmtree(begin)
    for plan in (["--plan"], []):
        assert distil("--resume", runs["run"], "trainer.max_steps=2", *plan) == 0
    assert result(runs["run"], 2) == result(runs["whole"], 2)
    assert distil("--base", base) == 0  # it has ended
    shutil.rmtree(runs["run"])
    capsys.readouterr()
    assert_one_error_line(capsys, distil("--base", base), ("student.init: ", "begin' is neither"))


@pytest.mark.parametrize("kind", ["pixel"])
def test_a_training_goes_on_without_the_model_whose_weights_it_began_with(kind: str, home: Path) -> None:
    script = SCRIPTS[kind]
    shutil.copytree(home / "logs" / "run" / "model", "begin")
    keys = ("logging.name=second", "model.init=begin")
    assert run_script(script, "--base", "base.yaml", *keys) == 0
    shutil.rmtree("begin")
    for plan in (["--plan"], []):
        assert run_script(script, "--resume", "logs/second", "trainer.max_steps=2", *plan) == 0


def test_a_resume_stays_in_its_folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = project(built, tmp_path, monkeypatch)
    before = (run / "config.yaml").read_text()
    for words, keys in (
        (["logging.name=other"], "logging.name"),
        ([f"logging.dir={tmp_path / 'x'}"], "logging.dir"),
        (["logging.name=other", "logging.dir=x"], "logging.name and logging.dir"),
    ):
        for plan in ([], ["--plan"]):
            code = distil("--resume", run, "trainer.max_steps=3", *words, *plan)
            assert_one_error_line(capsys, code, (f"error: {keys}: a resumed run goes on in its own folder, {run};",))
    assert (run / "config.yaml").read_text() == before
    run.rename(tmp_path / "renamed")
    assert distil("--resume", tmp_path / "renamed", f"logging.dir={tmp_path}", "logging.name=renamed") == 0


def test_resume_last_finds_the_newest_run_at_any_depth(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = project(built, tmp_path, monkeypatch)
    nested = Path(shutil.copytree(run, tmp_path / "logs" / "exp" / "a"))
    shutil.copytree(run, tmp_path / "logs" / "exp" / "a" / "samples" / "copy")  # in a run: not one of its own
    shutil.copytree(run, tmp_path / "elsewhere" / "b")
    (tmp_path / "logs" / "exp" / "round").symlink_to(tmp_path / "logs")
    for folder in (tmp_path / "logs").rglob("*"):
        os.utime(folder, (2, 2) if nested in folder.parents and "copy" not in folder.parts else (1, 1))
    os.utime(nested / "samples" / "copy" / "config.yaml", (9, 9))
    for words, found in (([], "logs/exp/a"), (["logging.dir=elsewhere", "logging.name=b"], "elsewhere/b")):
        capsys.readouterr()
        assert distil("--resume", "last", "--plan", *words) == 0
        assert capsys.readouterr().out.startswith(f"{found}: at step 2 already")
