"""Open what a user names as a set of images: a model, a folder, an .npz, a first stage, a tensor."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.checkpoints.first_stages import FirstStageSource, is_first_stage_folder
from ldm_dkdm.checkpoints.releases import how_to_get
from ldm_dkdm.checkpoints.source import DESCRIPTIONS, describes_model, home_of
from ldm_dkdm.checkpoints.weight_files import all_weights
from ldm_dkdm.config.recipes import find_shipped
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.conversions import refuse_npy
from ldm_dkdm.evaluation.reconstruction import Reconstructions
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import ImageSource, TensorImages, image_files, require_images
from ldm_dkdm.files import expanded
from ldm_dkdm.images import GRID, SAMPLED, count_images
from ldm_dkdm.model import DiffusionModel, load_model
from ldm_dkdm.npz import is_npz

Images = DiffusionModel | Tensor | np.ndarray | str | Path
USUAL = re.compile(r"((student|model|last)\.|(pytorch|diffusion_pytorch)_model|\d+x\d+_diffusion)")  # names of weights
FEW = 10  # images that may be previews of a model
LARGE = 1 << 20  # bytes of a file that may be a model, where the images are few


def open_images(
    images: Images,
    config: SamplingConfig,
    size: int | None = None,
    device: torch.device | str = "cpu",
    reconstructed: ImageSource | None = None,
) -> ImageSource:
    """The set of images that a user names.

    Args:
        images: a model, images uint8 (N,H,W,C), or a path.
        config: how a model is sampled. size: side to which folders' images are cropped and resized.
        device: of a model that is opened here.
        reconstructed: the images that the path of a first stage stands for after encoding and decoding.

    Raises:
        UserError: a path that is none of these, or a set that does not fit.
    """
    if isinstance(images, DiffusionModel):
        return sampled(images, config)
    if isinstance(images, Tensor):
        require_images(images)
        return TensorImages(images.cpu())
    assert not isinstance(images, np.ndarray)  # `taken` has made a tensor of it
    path = expanded(images)
    require_set(path)
    if _is_first_stage(path):
        if reconstructed is None:
            raise UserError(
                f"samples: {path} is a first stage; name the images that it should reconstruct as reference"
            )
        return Reconstructions(FirstStageSource(path).codec().to(device), reconstructed, str(images))
    if not is_model(path):
        return image_files(path, size)
    return sampled(load_model(path).to(device), config, str(images))


def taken(images: Images, name: str) -> Images:
    """A set that a user names, a NumPy array as a tensor.

    Raises:
        UserError: something else than a set; `name` is the argument.
    """
    if isinstance(images, np.ndarray):
        try:
            return torch.from_numpy(np.ascontiguousarray(images))
        except TypeError as error:
            raise UserError(f"{name}: images are uint8 (N,H,W,C); got {images.dtype} {images.shape}") from error
    known: object = images
    if isinstance(known, (Tensor, str, Path, DiffusionModel)):
        return images
    kind = type(images).__name__
    raise UserError(f"{name}: expected a DiffusionModel, images uint8 (N,H,W,C) or a path, got a value of type {kind}")


def require_set(path: Path, what: str = "the path of a set of images") -> None:
    """Refuse a path that does not exist, and a file of one array.

    Raises:
        UserError: says what `what` may be.
    """
    if not find_shipped(path).exists():
        advice = how_to_get(path, "correct the path")
        raise UserError(
            f"{path}: no such file or folder; {what} is a model, a folder of images, an .npz of images, or statistics "
            f"(.npz); {advice}"
        )
    refuse_npy(path)


def is_model(path: Path) -> bool:
    """Whether a path is opened as a diffusion model: any but an .npz, a first stage, and a folder of images.

    Files beside the images of a folder make it a model's if they describe one by their content. The latents in an
    output of `dkdm sample` do not count as weights.

    Raises:
        UserError: a folder that may be either.
    """
    if is_npz(path) or _is_first_stage(path):
        return False
    if not path.is_dir() or describes_model(path):
        return True
    described = any((path / name).exists() for name in DESCRIPTIONS)
    files = list(all_weights(path, SAMPLED if (path / GRID).is_file() else ()))
    if not described and not files:
        return False
    images = count_images(path, FEW)
    if not images:
        return True
    large = [file for file in files if images < FEW and file.stat().st_size > LARGE]
    weights = next((file for file in files if USUAL.match(file.name)), large[0] if large else None)
    if weights is not None:
        raise UserError(
            f"{path}: holds images and {weights.name}, without a config that describes a model; name a folder with the "
            f"images alone, or {weights} for the model"
        )
    return False


def _is_first_stage(path: Path) -> bool:
    """Whether a path is a first-stage folder, the run folder that one is in, or the weights in it."""
    return is_first_stage_folder(home_of(path))
