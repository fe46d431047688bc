"""CompVis's config beside a checkpoint tells what the tensors do not show."""

import logging
from pathlib import Path

import pytest
import torch
import yaml

from ldm_dkdm import UserError, load_model
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet
from tests.cli import run_script
from tests.parts import UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint

UNET = {**UNET_PARAMS, "num_heads": 8, "use_spatial_transformer": False}
PLACES = ("run/checkpoints/last.yaml", "run/checkpoints/config.yaml", "run/configs/2022-01-01T00-00-00-project.yaml")


def write_config(file: Path, unet: dict[str, object] = UNET, **model: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    params = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 20, **model, "unet_config": {"params": unet}}
    file.write_text(
        yaml.safe_dump({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}})
    )
    return file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    unet, vq = randomised(UNet(**UNET_PARAMS)), randomised(VQModel(**VQ_PARAMS))
    return write_compvis_checkpoint(folder / "last.ckpt", unet, vq, NoiseSchedule(num_timesteps=20))


@pytest.mark.parametrize("place", PLACES)
def test_a_config_where_compvis_keeps_it_stands_for_hints(place: str, checkpoint: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / place)
    hinted = load_model(checkpoint, image_size=8, num_head_channels=32)
    read = load_model(checkpoint)
    x, t = torch.randn(2, *read.shape), torch.tensor([3, 17])
    assert read.shape == (3, 8, 8) and read.network.state_dict().keys() == hinted.network.state_dict().keys()
    assert torch.equal(read.predict(x, t).eps, hinted.predict(x, t).eps)
    file.unlink()
    with pytest.raises(UserError, match="image_size"):
        load_model(checkpoint)


def test_a_hint_wins_over_the_config(checkpoint: Path) -> None:
    write_config(checkpoint.with_suffix(".yaml"), {**UNET, "num_head_channels": 16})
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 17])
    of_config, of_hint, right = (
        load_model(checkpoint, image_size=8, **hints).predict(x, t).eps
        for hints in ({}, {"num_heads": 2}, {"num_head_channels": 32})
    )
    assert torch.equal(of_hint, right) and not torch.equal(of_config, right)  # the blocks with attention are 64 wide


def test_scale_and_parameterization_are_the_configs(checkpoint: Path) -> None:
    write_config(checkpoint.with_suffix(".yaml"), parameterization="v", scale_factor=0.25)
    model = load_model(checkpoint)
    assert model.parameterization == "v" and model.codec().scale_factor == 0.25
    assert load_model(checkpoint, scale_factor=0.5, parameterization="eps").codec().scale_factor == 0.5


@pytest.mark.parametrize(
    ("keys", "schedule"),
    [
        ({}, NoiseSchedule("scaled_linear", 20, 0.0015, 0.0195)),
        (
            {"beta_schedule": "sqrt_linear", "linear_start": 1e-3, "linear_end": 0.3},
            NoiseSchedule("linear", 20, 1e-3, 0.3),
        ),
        ({"given_betas": [0.1, 0.2, 0.3, 0.4]}, NoiseSchedule(betas=[0.1, 0.2, 0.3, 0.4])),
    ],
)
def test_a_pruned_file_has_the_schedule_of_its_config(
    keys: dict[str, object], schedule: NoiseSchedule, checkpoint: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if k not in ("betas", "alphas_cumprod")}
    torch.save(content, checkpoint)
    write_config(checkpoint.with_suffix(".yaml"), **keys)
    assert torch.equal(load_model(checkpoint).schedule.alphas_cumprod, schedule.alphas_cumprod)


def test_another_networks_config_is_named_and_not_used(checkpoint: Path, caplog) -> None:
    write_config(checkpoint.with_suffix(".yaml"), {**UNET, "model_channels": 64})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="image_size"):
        load_model(checkpoint)
    assert "last.yaml: describes another network than last.ckpt (model_channels: 64, not 32)" in caplog.text


@pytest.mark.parametrize("text", ["- a\n", "model: 3\n", "model: {params: {unet_config: 1}}\n", "a: [\n", "\0"])
def test_other_yaml_files_are_not_this_models(text: str, checkpoint: Path) -> None:
    checkpoint.with_suffix(".yaml").write_text(text)
    assert load_model(checkpoint, image_size=8, num_head_channels=32).shape == (3, 8, 8)


def test_a_file_that_was_converted_to_compvis_opens_without_hints(teacher_folder: Path, tmp_path: Path) -> None:
    assert run_script("convert.py", teacher_folder, tmp_path / "theirs.ckpt", "--to", "compvis") == 0
    own, theirs = load_model(teacher_folder), load_model(tmp_path / "theirs.ckpt")
    x, t = torch.randn(2, *own.shape), torch.tensor([3, 17])
    assert torch.equal(own.predict(x, t).eps, theirs.predict(x, t).eps)
    assert theirs.codec().scale_factor == own.codec().scale_factor


def test_numbers_that_make_no_schedule_name_the_file(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save({k: v for k, v in content["state_dict"].items() if k not in ("betas", "alphas_cumprod")}, checkpoint)
    file = write_config(checkpoint.with_suffix(".yaml"), timesteps="many")
    with pytest.raises(UserError, match=f"{file}: num_timesteps"):
        load_model(checkpoint)


def test_inspect_shows_what_the_config_tells(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(checkpoint.with_suffix(".yaml"))
    assert run_script("inspect_checkpoint.py", checkpoint) == 0
    printed = capsys.readouterr().out
    assert "from the config beside it" in printed and "image_size 8, num_head_channels 32" in printed
    assert run_script("inspect_checkpoint.py", checkpoint, "--config") == 0
    pasted = capsys.readouterr().out
    assert "image_size: 8" in pasted and "num_head_channels: 32" in pasted and "???" not in pasted


@pytest.mark.parametrize(
    ("key", "value"), [("image_size", -3), ("num_heads", -7), ("num_heads", "x"), ("dropout", 5.0)]
)
def test_inspect_refuses_a_bad_value_by_its_name(key: str, value: object, checkpoint: Path, capsys) -> None:
    write_config(checkpoint.with_suffix(".yaml"), {**UNET, key: value})
    assert run_script("inspect_checkpoint.py", checkpoint) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "last" in line and f"{key}: " in line
