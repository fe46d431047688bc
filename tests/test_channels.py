"""Images of 1, 2, 4 and 5 channels through the whole path, and decorations that fail."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_dkdm import DiffusionModel, NoiseSchedule, distill, load_model, train
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.model_folder import write_folder
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.schema import FirstStageCard, FirstStageRun
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage import AutoencoderKL, VQModel
from ldm_dkdm.images import grid, to_image
from ldm_dkdm.networks import UNet
from ldm_dkdm.npz import save_npz
from ldm_dkdm.training.autoencoder import train_first_stage
from tests.cli import run_script, sample, write_yaml
from tests.parts import DDCONFIG, UNET_PARAMS, VQ_PARAMS, randomised
from tests.test_first_stage_training import first_stage_config

CHANNELS = [1, 2, 4, 5]
STEPS = {"steps": 1, "batch_size": 2, "save_every": 1, "sample_every": 1, "sample_count": 2, "sample_steps": 2}
DISTIL = {**STEPS, "rho": 0.2, "warmup": "noise", "check": False, "progress": False, "accelerator": "cpu"}


def pixel_model(channels: int) -> DiffusionModel:
    """An 8x8 pixel model with T = 20."""
    network = randomised(UNet(**{**UNET_PARAMS, "in_channels": channels, "out_channels": channels}))
    return DiffusionModel(network.eval(), schedule=NoiseSchedule("linear", 20), space="pixel")


def vq_folder(folder: Path, images: int, latents: int = 3) -> Path:
    """A first stage of 32x32 images and 8x8 latents."""
    dd = {**DDCONFIG, "in_channels": images, "out_ch": images, "z_channels": latents}
    params = {**VQ_PARAMS, "ddconfig": dd, "embed_dim": latents}
    card = FirstStageCard("model.safetensors", "ldm_dkdm.first_stage.VQModel", params, 0.5)
    write_folder(folder, card, randomised(VQModel(**params)).state_dict())
    return folder


def test_grey_images_are_grey_and_other_channels_stand_side_by_side() -> None:
    images = torch.randint(256, (3, 4, 6, 5), dtype=torch.uint8)
    assert (to_image(images[0, ..., :1]).mode, to_image(images[0, ..., :3]).mode) == ("L", "RGB")
    shown = np.asarray(to_image(images[0]))
    for channel in range(5):
        assert np.array_equal(shown[:, 6 * channel : 6 * (channel + 1)], images[0, ..., channel].numpy())
    assert grid(images, columns=3, gap=2).size == (3 * 32 - 2, 4)
    sheet = np.asarray(grid(images[..., :1], columns=3, gap=0))
    assert np.array_equal(sheet[:, 6:12, 0], images[1, ..., 0].numpy())


@pytest.mark.parametrize("channels", CHANNELS)
def test_pixel_teachers_are_sampled_and_distilled(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = pixel_model(channels)
    teacher.save(tmp_path / "teacher")
    command = ["-r", tmp_path / "teacher", "-n", 3, "-c", 2, "-l", tmp_path / "out", "--npz"]
    if channels != 1:
        assert sample(*command) == 2
        assert f"--no_png: {tmp_path}/teacher's images have {channels} channels" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    command += ["--compare", tmp_path / "c.png", *(["--no_png"] if channels != 1 else [])]
    assert sample(*command) == 0
    images = np.load(tmp_path / "out/samples.npz")["arr_0"]
    assert images.shape == (3, 8, 8, channels) and (tmp_path / "c.png").is_file()
    if channels == 1:
        with Image.open(tmp_path / "out/img/000001.png") as stored:
            assert stored.mode == "L" and np.array_equal(np.asarray(stored), images[1, ..., 0])
    result = distill(teacher, pixel_model(channels), tmp_path / "run", **DISTIL)
    assert result.step == 1 and len(list((tmp_path / "run/samples").glob("step=*.png"))) == 1
    assert load_model(tmp_path / "run").sample(2, steps=2).shape == (2, 8, 8, channels)


@pytest.mark.parametrize("channels", CHANNELS)
def test_pixel_models_train_on_an_npz_and_grey_ones_on_files(channels: int, tmp_path: Path) -> None:
    save_npz(torch.randint(256, (4, 8, 8, channels), dtype=torch.uint8), tmp_path / "x.npz")
    assert train(pixel_model(channels), tmp_path / "x.npz", tmp_path / "run", progress=False, **STEPS).step == 1
    assert (tmp_path / "run/samples/data.png").is_file()
    (tmp_path / "files").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "files/a.png")
    if channels == 1:
        assert train(pixel_model(1), tmp_path / "files", tmp_path / "files-run", progress=False, **STEPS).step == 1
        return
    with pytest.raises(UserError, match=f"images of {channels} channels are read from an .npz"):
        train(pixel_model(channels), tmp_path / "files", tmp_path / "files-run", progress=False, **STEPS)
    assert not (tmp_path / "files-run").exists()


def test_a_conditional_training_prints_its_classes_and_refuses_what_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("2", "10"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / name / "a.png")
    network = UNet(**{**UNET_PARAMS, "in_channels": 1, "out_channels": 1, "num_classes": 11})
    model = DiffusionModel(network, schedule=NoiseSchedule("linear", 20), space="pixel")
    with caplog.at_level(logging.INFO, "ldm_dkdm"):
        assert train(model, tmp_path / "data", tmp_path / "run", progress=False, **STEPS).step == 1
    assert "data.path: 2 classes: 2, 10" in caplog.text
    Image.new("L", (8, 8)).save(tmp_path / "data/stray.png")
    with pytest.raises(UserError, match=r"a sub-folder for every class; .*data/stray\.png is in none"):
        train(model, tmp_path / "data", tmp_path / "other", progress=False, **STEPS)


@pytest.mark.parametrize(("images", "latents"), [(1, 3), (2, 4), (4, 2), (5, 5)])
def test_first_stages_of_other_channels_are_sampled_decoded_and_distilled(
    images: int, latents: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = vq_folder(tmp_path / "vq", images, latents)
    network = randomised(UNet(**{**UNET_PARAMS, "in_channels": latents, "out_channels": latents})).eval()
    teacher = DiffusionModel(network, schedule=NoiseSchedule("linear", 20), first_stage=stage)
    assert teacher.sample(2, steps=2).shape == (2, 32, 32, images)
    save_file({"x": torch.randn(2, latents, 8, 8)}, tmp_path / "x.safetensors")
    decode = [tmp_path / "x.safetensors", "--first_stage", stage, "-o", tmp_path / "out"]
    assert run_script("decode_latents.py", *decode) == 0
    assert np.load(tmp_path / "out/samples.npz")["arr_0"].shape == (2, 32, 32, images)
    assert len(list(tmp_path.glob("out/img/*.png"))) == (2 if images == 1 else 0)
    assert ("in samples.npz only" in capsys.readouterr().err) == (images != 1)
    student = DiffusionModel(randomised(UNet(**network.arguments), 1), like=teacher)
    assert distill(teacher, student, tmp_path / "run", **DISTIL).step == 1
    assert len(list((tmp_path / "run/samples").glob("step=*.png"))) == 1


@pytest.mark.parametrize("channels", [1, 4])
def test_a_first_stage_of_other_channels_is_trained(channels: int, tmp_path: Path) -> None:
    save_npz(torch.randint(256, (8, 32, 32, channels), dtype=torch.uint8), tmp_path / "x.npz")
    dd = {**DDCONFIG, "in_channels": channels, "out_ch": channels}
    config = first_stage_config(
        tmp_path / "x.npz",
        tmp_path / "logs",
        first_stage={"params": {**VQ_PARAMS, "ddconfig": dd}},
        loss={"adversarial": 0.1, "adversarial_start": 2},
        trainer={"max_steps": 4},
    )
    file = write_yaml(tmp_path / "vq.yaml", config)
    train_first_stage(load_config(file, (), FirstStageRun), tmp_path / "run", progress=False)
    assert FirstStageSource(tmp_path / "run/first_stage").codec().channels == channels


@pytest.mark.parametrize(
    ("channels", "out", "keys", "message"),
    [
        (1, 3, {}, r"first_stage\.params\.ddconfig\.out_ch: 3 must be in_channels, 1"),
        (1, 1, {"hue": 0.1}, "hue: images of 1 channels have none; set it to 0"),
    ],
)
def test_first_stage_terms_that_need_rgb_are_refused_before_anything_is_written(
    channels: int, out: int, keys: dict[str, float], message: str, tmp_path: Path
) -> None:
    dd = {**DDCONFIG, "in_channels": channels, "out_ch": out}
    config = first_stage_config(tmp_path, tmp_path, first_stage={"params": {**VQ_PARAMS, "ddconfig": dd}}) | keys
    file = write_yaml(tmp_path / "vq.yaml", config)
    with pytest.raises(UserError, match=message):
        train_first_stage(load_config(file, (), FirstStageRun), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_first_stage_that_decodes_other_images_than_it_encodes_cannot_train(tmp_path: Path) -> None:
    dd = {**DDCONFIG, "in_channels": 1, "double_z": True}
    params = {"ddconfig": dd, "embed_dim": 3}
    card = FirstStageCard("model.safetensors", "ldm_dkdm.first_stage.AutoencoderKL", params, 0.5)
    write_folder(tmp_path / "kl", card, randomised(AutoencoderKL(**params)).state_dict())
    model = DiffusionModel(UNet(**UNET_PARAMS), schedule=NoiseSchedule("linear", 20), first_stage=tmp_path / "kl")
    save_npz(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), tmp_path / "x.npz")
    with pytest.raises(UserError, match="first_stage: it encodes images of 1 channels and decodes 3"):
        train(model, tmp_path / "x.npz", tmp_path / "run", progress=False, **STEPS)


def test_decorations_that_fail_are_logged_and_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise TypeError("no such colour")

    teacher, plain = pixel_model(3), tmp_path / "plain"
    distill(teacher, pixel_model(3), plain, **DISTIL)
    for module in ("ldm_dkdm.training.from_images", "ldm_dkdm.training.grids"):
        monkeypatch.setattr(f"{module}.save_image", failing)
    monkeypatch.setattr("ldm_dkdm.checkpoints.model_folder.write_readme", failing)
    with caplog.at_level(logging.WARNING, "ldm_dkdm"):
        result = distill(teacher, pixel_model(3), tmp_path / "run", **DISTIL)
        save_npz(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), tmp_path / "x.npz")
        assert train(pixel_model(3), tmp_path / "x.npz", tmp_path / "trained", progress=False, **STEPS).step == 1
    assert result.step == 1
    for name in ("samples/step=00000001.png", "student/README.md"):
        assert f"{tmp_path}/run/{name}: left out (TypeError: no such colour)" in caplog.text
    assert f"{tmp_path}/trained/samples/data.png: left out" in caplog.text
    whole, without = (load_file(run / "student/student.safetensors") for run in (plain, tmp_path / "run"))
    assert all(torch.equal(whole[name], without[name]) for name in whole)


def test_weights_are_saved_before_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm_dkdm.training.grids.save_image", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        distill(pixel_model(1), pixel_model(1), tmp_path / "run", **DISTIL)
    assert (tmp_path / "run/checkpoints/step=00000001.ckpt").is_file()
