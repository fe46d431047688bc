"""A bit that flips in a file of weights or in what a run saves is noticed when the file is read."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.hashes import check_file, write_hash
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.files import write_torch
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet
from ldm_dkdm.records import NoisyBatch
from tests.parts import (
    DIFFUSION,
    UNET_PARAMS,
    VQ_PARAMS,
    first_stage_folder,
    model_folder,
    randomised,
    write_compvis_checkpoint,
)

FLIPS = int(os.environ.get("DKDM_FLIPS", "20"))  # in each kind of file
HINTS = {"image_size": 8, "num_head_channels": 32}


def checkpoint(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "step=00000001.ckpt"
    write_torch(path, {"state_dict": UNet(**UNET_PARAMS).state_dict(), "global_step": 1})
    write_hash(path, path)
    return path, lambda: check_file(path)


def pool(folder: Path) -> tuple[Path, Callable[[], object]]:
    path, full = folder / "step=00000001.pool-rank0.safetensors", NoisyPool(64, (3, 8, 8))
    full.fill(NoisyBatch(torch.randn(64, 3, 8, 8), torch.arange(64) % 20, None))
    full.save(path, 1)
    return path, lambda: NoisyPool(64, (3, 8, 8)).load(path)


def model(folder: Path) -> tuple[Path, Callable[[], object]]:
    home = model_folder(folder / "model", first_stage_folder(folder / "vq"))
    return home / "model.safetensors", lambda: load_model(home)


def first_stage(folder: Path) -> tuple[Path, Callable[[], object]]:
    home = model_folder(folder / "model", first_stage_folder(folder / "vq"))
    return folder / "vq" / "model.safetensors", lambda: load_model(home).codec()


def third_party(folder: Path) -> tuple[Path, Callable[[], object]]:
    nets = randomised(UNet(**UNET_PARAMS)), randomised(VQModel(**VQ_PARAMS))
    path = write_compvis_checkpoint(folder / "model.ckpt", *nets, schedule_of(DIFFUSION))
    whole = read_tensors(path)
    return path, lambda: changed(whole, path)


def changed(whole: dict[str, torch.Tensor], path: Path) -> None:
    """Read a file whose bits may have flipped between its parts, where they change nothing."""
    found = read_tensors(path)
    if found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole):
        raise UserError("nothing has changed")


KINDS = {"checkpoint": checkpoint, "pool": pool, "model": model, "first stage": first_stage, "CompVis": third_party}


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_noticed(kind: str, tmp_path: Path) -> None:
    path, read = KINDS[kind](tmp_path)
    places = random.Random(kind)
    whole = path.read_bytes()
    unnoticed = []
    for _ in range(FLIPS):
        bit = places.randrange(8 * len(whole))
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            read()
        except UserError:
            continue
        unnoticed.append(bit)
    assert unnoticed == []


def test_the_hash_can_be_left_out(tmp_path: Path) -> None:
    path, _ = model(tmp_path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: is damaged: its content does not have the SHA-256"):
        load_model(path.parent)
    assert load_model(path.parent, verify=False).path == path.parent
