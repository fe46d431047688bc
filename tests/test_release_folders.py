"""Folders of other code with a config.yaml of its own."""

from pathlib import Path

import pytest
import torch

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet
from tests.parts import UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint

CONFIG = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params: {linear_start: 0.0015}\n"
HINTS = {"image_size": 8, "num_head_channels": 32}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "celeba256"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    unet, vq = randomised(UNet(**UNET_PARAMS)), randomised(VQModel(**VQ_PARAMS))
    write_compvis_checkpoint(folder / "model.ckpt", unet, vq, NoiseSchedule(num_timesteps=20))
    return folder


def test_the_folder_of_a_release_is_its_checkpoint(release: Path) -> None:
    whole, file = (load_model(path, **HINTS) for path in (release, release / "model.ckpt"))
    assert whole.path == file.path == release / "model.ckpt"
    assert torch.equal(whole.network.out[2].weight, file.network.out[2].weight)
    assert FirstStageSource(release).codec(8).autoencoder.codes == 64


def test_several_checkpoints_or_none_are_named(release: Path) -> None:
    (release / "model.ckpt").rename(release / "last.ckpt")
    (release / "epoch=1.ckpt").write_bytes((release / "last.ckpt").read_bytes())
    with pytest.raises(
        UserError, match=r"config.yaml belongs to other code; name the checkpoint file itself: epoch=1.ckpt, last"
    ):
        load_model(release, **HINTS)
    for file in release.glob("*.ckpt"):
        file.unlink()
    with pytest.raises(UserError, match=r"such as model\.ckpt, which is not beside it"):
        load_model(release, **HINTS)


def test_a_card_of_ours_that_is_damaged_is_still_ours(release: Path) -> None:
    (release / "config.yaml").write_text("weights: model.safetensors\nnetworks: {}\n")
    with pytest.raises(UserError, match=r"networks: unknown key; did you mean 'network'"):
        load_model(release)
