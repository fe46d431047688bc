"""What a resume compares: keys, defaults of older versions, the first stage; the devices of a process; the disk."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm_dkdm import UserError, load_config
from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.device import default_device
from ldm_dkdm.training.finding import find_run
from ldm_dkdm.training.room import require_disk
from ldm_dkdm.training.run_folder import RunFolder, check_run, checkpoints, open_run, step_of
from tests.cli import contents, distil, run_script, write_yaml
from tests.parts import UNET_PARAMS, distill_config, first_stage_folder
from tests.run_folders import copied
from tests.test_config_errors import assert_one_error_line
from tests.training_images import LOGGING, TRAINER, training_images


@pytest.fixture
def base(teacher_folder: Path, tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "base.yaml", distill_config(teacher_folder, tmp_path))


@pytest.fixture(scope="module")
def of_one_step(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step, to be copied."""
    home = tmp_path_factory.mktemp("finished")
    base = write_yaml(home / "base.yaml", distill_config(teacher_folder, home))
    assert distil("--base", base, "trainer.max_steps=1") == 0
    return home / "run"


@pytest.fixture
def run(of_one_step: Path, tmp_path: Path) -> Path:
    """A copy of it, which is that of `base` and one step."""
    return copied(of_one_step, tmp_path)


def changed(folder: RunFolder, **values: tuple[str, object]) -> None:
    """Write a run's config.yaml again with other values: section=(key, value)."""
    stored = folder.path / "config.yaml"
    tree = yaml.safe_load(stored.read_text())
    for section, (key, value) in values.items():
        tree[section][key] = value
    write_yaml(stored, tree)


@pytest.mark.parametrize("change", ["teacher.guidance=3.0", "teacher.parameterization=v", "teacher.null_label=1"])
def test_a_moved_teacher_hides_no_other_change(change: str, base: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    open_run(load_config(base), folder)
    check_run(load_config(base, ["teacher.ckpt=elsewhere"]), folder, resumed=True)
    with pytest.raises(UserError, match=f"{change.partition('=')[0]}: cannot change"):
        check_run(load_config(base, ["teacher.ckpt=elsewhere", change]), folder, resumed=True)


def test_the_kind_of_a_teacher_s_weights_may_be_said_later(base: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    open_run(load_config(base), folder)
    open_run(load_config(base, ["teacher.use_ema=false"]), folder, resumed=True)
    with pytest.raises(UserError, match=r"teacher\.use_ema: cannot change"):
        check_run(load_config(base, ["teacher.use_ema=true"]), folder, resumed=True)


def test_a_resume_is_advised_where_it_would_be_taken(base: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    open_run(load_config(base), folder)
    for change, advice in (("trainer.max_steps=9", "continue in this one"), ("distill.stride=2", "its own distill.st")):
        with pytest.raises(UserError, match=f"{advice}.* \\(--resume"):
            check_run(load_config(base, [change]), folder, resumed=False)


def test_files_of_a_run_mean_the_run_to_resume(tmp_path: Path) -> None:
    run, kept = tmp_path / "run", tmp_path / "run" / "checkpoints"
    kept.mkdir(parents=True)
    (run / "config.yaml").write_text("trainer: {max_steps: 1}\n")
    for step in (2, 10):
        (kept / f"step={step:08d}.ckpt").write_bytes(b"")
    for named in (run, run / "config.yaml", kept, kept / "step=00000010.ckpt"):
        assert find_run(str(named), DistillRun).path == run
    for gone in ("step=00000002.ckpt", "last.ckpt"):
        with pytest.raises(UserError, match=f"--resume: .*newest checkpoint, which is step=00000010.ckpt; name {run}"):
            find_run(str(kept / gone), DistillRun)


def test_the_same_command_goes_on_in_a_run_that_has_the_defaults_of_an_older_version(
    base: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    open_run(load_config(base), folder)
    changed(folder, distill=("pool_storage", "memory"), trainer=("devices", 1))
    changed(folder, trainer=("num_nodes", 1))
    open_run(load_config(base), folder)  # accepts it
    changed(folder, trainer=("devices", 2))
    with pytest.raises(UserError, match=r"another configuration \(trainer\.devices: 2 there, null here"):
        open_run(load_config(base), folder)


def test_a_moved_training_finds_its_first_stage_and_refuses_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    first_stage_folder(tmp_path / "old" / "vq")
    config = {
        "model": {"target": "ldm_dkdm.networks.UNet", "params": UNET_PARAMS},
        "diffusion": {"num_timesteps": 20, "space": "latent"},
        "data": {"path": str(training_images(tmp_path)), "image_size": 32, "batch_size": 4},
        "first_stage": {"ckpt": "vq", "scale_factor": 0.5},
        "trainer": {**TRAINER, "max_steps": 1},
        "logging": {**LOGGING, "dir": "logs", "name": "run", "sample_every": 100},
    }
    monkeypatch.chdir(tmp_path / "old")
    assert run_script("train_ldm.py", "--base", write_yaml(tmp_path / "base.yaml", config)) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    run = tmp_path / "new" / "logs" / "run"
    assert run_script("train_ldm.py", "--resume", run, "trainer.max_steps=2") == 0
    capsys.readouterr()
    first_stage_folder(tmp_path / "new" / "vq", weight=2.0)
    code = run_script("train_ldm.py", "--resume", run, "trainer.max_steps=3")
    assert_one_error_line(capsys, code, ("first_stage: ", "is not the one that", "put the old one back"))
    (run / "model" / "config.yaml").write_text(
        "".join(
            line
            for line in (run / "model" / "config.yaml").read_text().splitlines(keepends=True)
            if "first_stage_sha256" not in line
        )
    )
    assert run_script("train_ldm.py", "--resume", run, "trainer.max_steps=3") == 0  # as an older version left it


@pytest.mark.parametrize(
    ("count", "launcher", "found"),
    [(4, "srun", 2), (1, "srun", 0), (2, "srun", None), (4, "torchrun", 2), (1, "torchrun", None)],
)
def test_a_process_takes_its_own_gpu_or_the_only_one_that_srun_shows_it(
    count: int, launcher: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds = {
        "srun": {"SLURM_STEP_ID": 0, "SLURM_NTASKS": 4, "SLURM_NNODES": 1, "SLURM_PROCID": 2, "SLURM_LOCALID": 2},
        "torchrun": {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 4, "RANK": 2, "LOCAL_RANK": 2},
    }
    for name, value in worlds[launcher].items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if found is None:
        with pytest.raises(UserError, match=rf"process 3 of this machine has no GPU, PyTorch finds {count};"):
            default_device("auto")
    else:
        assert default_device("auto") == torch.device("cuda", found)


def test_the_size_of_a_run_is_known_although_another_rank_removes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_bytes(b"x" * 10)
    (tmp_path / "gone").write_bytes(b"x")
    stat = Path.stat
    monkeypatch.setattr(Path, "is_file", lambda file: True)

    def removed(file: Path, **options: bool) -> object:
        if file.name == "gone":
            raise FileNotFoundError
        return stat(file, **options)

    monkeypatch.setattr(Path, "stat", removed)
    require_disk(RunFolder(tmp_path), 1)


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_a_finished_run_exports_its_model_again(harm: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "student" / "student.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is mapped
    if harm == "missing":
        shutil.rmtree(run / "student")
    else:
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    capsys.readouterr()
    assert distil("--resume", run) == 0
    assert "student is written again, with the EMA weights of" in capsys.readouterr().err
    after = load_file(weights)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert distil("--resume", run) == 0 and not capsys.readouterr().err


@pytest.mark.usefixtures("few_images")
def test_a_finished_run_keeps_its_best_model_and_what_a_user_wrote(base: Path, tmp_path: Path, capsys) -> None:
    words = ("trainer.max_steps=2", "logging.save_every=1", "logging.evaluate_every=1", "logging.keep_best=true")
    assert distil("--base", base, *words) == 0
    run = tmp_path / "run"
    card = run / "student" / "config.yaml"
    written = card.read_text() + "typo: 1\n"
    card.write_text(written)
    capsys.readouterr()
    assert distil("--resume", run) == 2 and card.read_text() == written
    shutil.rmtree(run / "student")
    assert distil("--resume", run) == 2 and not (run / "student").exists()  # the last weights are not the best ones


def test_predictions_kept_for_a_replay_need_memory(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ldm_dkdm.training.room.os.sysconf", lambda name: 3200)  # a machine of 10 MB
    code = distil("--base", base, "distill.replay=1000")
    assert_one_error_line(capsys, code, ("distill.replay: the predictions take", "lower replay"))


def test_a_run_that_has_ended_has_no_plan(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("--base", base, "trainer.max_steps=2") == 0
    capsys.readouterr()
    assert distil("--resume", tmp_path / "run", "--plan") == 0
    assert (
        capsys.readouterr().out == f"{tmp_path / 'run'}: at step 2 already; a larger trainer.max_steps continues it\n"
    )


@pytest.mark.parametrize("harm", ["missing", "old"])
def test_a_run_that_was_killed_before_its_report_gets_it_from_the_same_call(harm: str, run: Path, base: Path) -> None:
    page = run / "report.html"
    end = page.read_text().partition('id="data">')[2]  # without the time of day above it
    if harm == "missing":
        page.unlink()
    else:
        page.write_text("of an earlier stop")
        os.utime(page, (1, 1))
    assert distil("--base", base, "trainer.max_steps=1") == 0
    assert end and page.read_text().partition('id="data">')[2] == end
    page.write_text("mine")
    assert distil("--base", base, "trainer.max_steps=1") == 0 and page.read_text() == "mine"


def test_a_run_that_was_killed_between_its_save_and_its_grid_draws_it_when_it_goes_on(
    base: Path, tmp_path: Path
) -> None:
    assert distil("--base", base, "trainer.max_steps=1", "logging.sample_every=1") == 0
    grid = tmp_path / "run" / "samples" / "step=00000001.png"
    whole = grid.read_bytes()
    grid.unlink()
    assert distil("--resume", tmp_path / "run", "trainer.max_steps=2") == 0
    assert grid.read_bytes() == whole


def test_a_configuration_that_was_edited_in_the_folder_is_that_of_the_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = run / "config.yaml"
    before = stored.read_text()
    for section, key, value in (("student", "parameterization", "x0"), ("distill", "rho", 3.0), ("trainer", "seed", 1)):
        changed(RunFolder(run), **{section: (key, value)})
        kept = contents(run)
        code = distil("--resume", run, "trainer.max_steps=2")
        said = (f"{section}.{key}: is {value} in {stored}", "but step=00000001.ckpt was trained with", "put that back")
        assert_one_error_line(capsys, code, said)
        assert contents(run) == kept
        stored.write_text(before)
    changed(RunFolder(run), trainer=("learning_rate", 0.002))
    assert distil("--resume", run, "trainer.max_steps=2") == 0


def test_a_model_whose_checkpoints_are_gone_is_not_trained_over(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = ("--base", base, "trainer.max_steps=1")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    kept = contents(run)
    for words in (("--resume", run, "trainer.max_steps=2"), ("--resume", run, "--plan"), begun):
        code = distil(*words)
        assert_one_error_line(capsys, code, (f"{run / 'student'}: is the model of a run without checkpoints", "NEW"))
        assert contents(run) == kept
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".step=00000001.ckpt.pending").touch()  # killed between its first model and its checkpoint
    assert distil("--resume", run, "trainer.max_steps=2") == 0
    assert "00000002.ckpt" in str(contents(run))


def test_checkpoints_that_were_to_stay_do_so_when_a_resume_keeps_others(base: Path, tmp_path: Path) -> None:
    words = ("logging.keep_every=2", "logging.save_every=1", "logging.sample_every=99")
    assert distil("--base", base, "trainer.max_steps=5", *words) == 0
    folder = tmp_path / "run" / "checkpoints"

    def steps() -> list[int]:
        return [step_of(checkpoint) for checkpoint in checkpoints(folder)]

    assert steps() == [2, 4, 5]
    assert distil("--resume", tmp_path / "run", "trainer.max_steps=7", "logging.keep_every=null") == 0
    assert steps() == [2, 4, 6, 7]
    assert distil("--resume", tmp_path / "run", "trainer.max_steps=9") == 0
    assert steps() == [2, 4, 8, 9]
