"""The model interface and the checks that the writers of all formats share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ldm_dkdm.checkpoints.as_built import require_as_built
from ldm_dkdm.checkpoints.diffusers_unet import CONSTANTS
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.shapes import UPSAMPLER
from ldm_dkdm.config.schema import DiffusionConfig, NetworkConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import exists
from ldm_dkdm.networks import UNet
from ldm_dkdm.pixel import Space

TORCH_ENDINGS = {"adm": ".pt", "compvis": ".ckpt", "dit": ".pt"}  # usual endings of the formats of torch.save


class SavedModel(Protocol):
    """The part of a `DiffusionModel` that formats write."""

    network: nn.Module
    node: NetworkConfig
    diffusion: DiffusionConfig
    schedule: NoiseSchedule
    first_stage: FirstStageSource | None
    shape: tuple[int, int, int]
    num_classes: int | None
    null_label: int | None
    info: dict[str, Any]

    @property
    def space(self) -> Space:
        """The space of its states."""

    @property
    def classes(self) -> Sequence[int] | None:
        """The labels that it takes."""

    def codec(self) -> Any:
        """Its first stage, opened."""


def require_eps_unet(model: SavedModel, code_base: str) -> None:
    """Refuse what CompVis's and guided-diffusion's samplers would misinterpret.

    Raises:
        UserError: another architecture, a network that predicts v, or one that would be taken for super-resolution.
    """
    if type(model.network) is not UNet:  # a subclass may compute something else
        raise UserError(f"format: {code_base} has no {type(model.network).__name__}; choose safetensors")
    require_as_built(model.network, model.node)
    if not model.space.encoded and all(model.node.params.get(key) == count for key, count in UPSAMPLER.items()):
        raise UserError(f"format: in {code_base} 6 channels in and out are super-resolution; choose safetensors")
    constants = [key for key, usual in CONSTANTS.values() if model.node.params.get(key, usual) != usual]
    if constants:
        raise UserError(f"format: {code_base} has no {', '.join(constants)}; choose diffusers or safetensors")
    if not model.node.params.get("middle_block", True):
        raise UserError(f"format: {code_base} has no UNet without a middle block; choose diffusers or safetensors")
    if not model.node.params.get("middle_attention", True):
        raise UserError(f"format: {code_base} has attention in every middle block; choose diffusers or safetensors")
    kind = model.node.parameterization
    if kind != "eps":
        raise UserError(
            f"format: {code_base} takes the output for eps, and this network predicts {kind}; "
            "choose diffusers or safetensors"
        )


def require_plain_timesteps(model: SavedModel, code_base: str) -> None:
    """Refuse a network that takes rescaled timesteps, where a code base feeds it t itself.

    Raises:
        UserError: `rescale_timesteps` changes t.
    """
    if model.diffusion.rescale_timesteps and model.schedule.num_timesteps != 1000:
        raise UserError(f"format: {code_base} has no rescale_timesteps, which this model needs; choose safetensors")


def require_name(path: Path, format: str) -> None:
    """Refuse the name of a safetensors file for a format that is a PyTorch file, which torch.load would not read.

    Raises:
        UserError: the name ends in .safetensors.
    """
    ending = TORCH_ENDINGS.get(format)
    if ending is not None and path.suffix.lower() == ".safetensors":
        raise UserError(
            f"{path}: {format} is a PyTorch file, whose name ends in .pt or .ckpt; name it "
            f"{path.with_suffix(ending).name}, or choose the format safetensors"
        )


def refuse_existing(path: Path, reason: str = "") -> None:
    """Refuse to overwrite a file or folder.

    Raises:
        UserError: it exists, or is a link to nothing.
    """
    if path.is_symlink() and not exists(str(path)):
        raise UserError(f"{path}: is a link to {path.readlink()}, where nothing is; choose another name or delete it")
    if exists(str(path)):
        raise UserError(f"{path}: exists; {reason}choose another name or delete it")
