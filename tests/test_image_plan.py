"""`train --plan`: the cost of a training on images."""

from pathlib import Path

import pytest

from ldm_dkdm.training.resuming import Choice
from tests.cli import contents, run_script, write_yaml
from tests.digits import LOGGING as DIGITS_LOGGING
from tests.digits import PIXEL, TRAINER, UNET
from tests.parts import UNET_PARAMS
from tests.training_images import training_images


def plan(base: Path, *words: str) -> int:
    return run_script("train_ldm.py", "--base", base, "--plan", *words)


@pytest.fixture
def latent(first_stage: Path, tmp_path: Path) -> Path:
    config = {
        "model": {"target": "ldm_dkdm.networks.UNet", "params": UNET_PARAMS},
        "first_stage": {"ckpt": str(first_stage)},
        "diffusion": {"num_timesteps": 20},
        "data": {"path": str(training_images(tmp_path)), "image_size": 32, "batch_size": 4},
        "trainer": {**TRAINER, "max_steps": 6},
        "logging": {"dir": str(tmp_path / "logs"), "name": "planned"},
    }
    return write_yaml(tmp_path / "latent.yaml", config)


def test_encodings_and_epochs_are_counted_and_nothing_is_written(latent: Path, tmp_path: Path, capsys) -> None:
    before = contents(tmp_path)
    assert plan(latent, "trainer.devices=1", "trainer.accumulate=2") == 0
    printed = capsys.readouterr().out
    assert "24, each also mirrored; 48 encodings before the training" in printed
    assert "48 (12 iterations of 4), 2.0 epochs" in printed
    assert "s of encoding" in printed and "an iteration" in printed
    assert contents(tmp_path) == before


def test_a_plan_says_that_a_time_limit_ends_the_run_early(latent: Path, capsys) -> None:
    for minutes, said in ((0.01, True), (10**6, False)):
        assert plan(latent, f"trainer.max_minutes={minutes}", "trainer.max_steps=100000") == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "trainer.max_minutes" in line]
        assert len(lines) == said
        assert all("(0.01) ends the training at about step" in x and x.endswith("of 100,000") for x in lines)


def test_encoding_in_every_step_belongs_to_an_iteration(latent: Path, capsys) -> None:
    assert plan(latent, "data.cache=false") == 0
    printed = capsys.readouterr().out
    assert "encodings" not in printed and "of encoding" not in printed


def test_other_processes_plan_nothing_and_shards_need_host_memory(
    latent: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    assert plan(latent, "--devices", "3", "trainer.strategy=fsdp") == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert "on each of 3 devices" in lines["images, training"] and "for the whole model of" in lines["memory, host"]
    assert lines["time"].endswith("; the traffic between the devices is not in it")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert plan(latent) == 0
    assert capsys.readouterr() == ("", "")


def test_missing_images_are_named_and_the_rest_is_planned(latent: Path, tmp_path: Path, capsys) -> None:
    assert plan(latent, f"data.path={tmp_path / 'nowhere'}") == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'nowhere'}: missing; planned without the images" in printed
    assert "an iteration, and the encoding" in printed


@pytest.mark.parametrize(
    ("word", "key"),
    [("model.params.num_classes=3", "model.params.num_classes: 3"), ("data.path=null", "data: names no images")],
)
def test_what_a_run_would_refuse_is_refused(digits: Path, tmp_path: Path, capsys, word: str, key: str) -> None:
    config = {
        "model": {"target": "ldm_dkdm.networks.UNet", "params": UNET},
        "diffusion": PIXEL,
        "data": {"path": str(digits), "image_size": 8, "batch_size": 8},
        "trainer": TRAINER,
        "logging": {**DIGITS_LOGGING, "dir": str(tmp_path), "name": "planned"},
    }
    assert plan(write_yaml(tmp_path / "digits.yaml", config), word) == 2
    assert key in capsys.readouterr().err
    assert not (tmp_path / "planned").exists()


def test_a_run_of_an_older_version_goes_on_with_a_key_without_effect(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(Choice, "state_dict", lambda choice: {})  # which did not store its configuration
    config = {
        "model": {"target": "ldm_dkdm.networks.UNet", "params": {**UNET, "out_channels": 3}},
        "diffusion": PIXEL,
        "data": {"path": str(digits), "image_size": 8, "batch_size": 8},
        "trainer": {**TRAINER, "max_steps": 1},
        "logging": {**DIGITS_LOGGING, "dir": str(tmp_path), "name": "old"},
    }
    base, run = write_yaml(tmp_path / "digits.yaml", config), tmp_path / "old"
    assert run_script("train_ldm.py", "--base", base, "loss.vlb_weight=0.5") == 2
    assert "loss.vlb_weight: has no effect" in capsys.readouterr().err
    assert run_script("train_ldm.py", "--base", base) == 0
    stored = run / "config.yaml"
    stored.write_text(stored.read_text().replace("vlb_weight: 1.0", "vlb_weight: 0.5"))
    for words in (("--plan",), ()):
        assert run_script("train_ldm.py", "--resume", run, "trainer.max_steps=2", *words) == 0
    assert (run / "checkpoints" / "step=00000002.ckpt").is_file()
