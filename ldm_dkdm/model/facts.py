"""Derive a model's process, shape, labels and first stage from arguments, its network and another model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.schema import DiffusionConfig, NetworkConfig
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.pixel import SPACES

if TYPE_CHECKING:
    from ldm_dkdm.model.diffusion_model import DiffusionModel


CLIPPING = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")


def process_of(schedule: NoiseSchedule | None, space: str | None, like: "DiffusionModel | None") -> DiffusionConfig:
    """The forward process as a config section.

    Of another model it has what belongs to its network (`rescale_timesteps`), and in the same space what belongs to
    its sampling, as far as the schedule does not say it.
    """
    if schedule is None:
        base = like.diffusion if like else DiffusionConfig()
        return base if space is None else replace(base, space=space)
    if not isinstance(schedule, NoiseSchedule):
        raise UserError(f"schedule: expected a NoiseSchedule, got {schedule!r}; make one with NoiseSchedule(NAME, T)")
    space = space or (like.diffusion.space if like else "latent")
    ends, usual = schedule.ends_given, pick(SPACES, space, "space").steps_offset
    own: dict[str, Any] = {
        "variance": None if schedule.variance == "posterior" else schedule.variance,
        "rescale_betas_zero_snr": schedule.ends_in_noise,
        "timestep_spacing": schedule.timestep_spacing,
    }
    own |= {key: value for key, value in ends.items() if not (key == "steps_offset" and value == usual)}
    if like:
        own["rescale_timesteps"] = like.diffusion.rescale_timesteps
    if like and like.diffusion.space == space:
        offset = usual if ends["steps_offset"] is None else ends["steps_offset"]
        to_x0 = offset == 0 if ends["set_alpha_to_one"] is None else ends["set_alpha_to_one"]
        same = (offset, to_x0) == (like.schedule.steps_offset, like.schedule.set_alpha_to_one)
        kept = [*CLIPPING, *ends] if same or not any(value is not None for value in ends.values()) else CLIPPING
        own |= {key: getattr(like.diffusion, key) for key in kept}
        own["timestep_spacing"] = schedule.timestep_spacing or like.diffusion.timestep_spacing
    if schedule.name == "betas":
        betas = schedule.unscaled_betas.tolist()
        return DiffusionConfig(num_timesteps=len(betas), space=space, betas=betas, **own)
    first, final = schedule.beta_start, schedule.beta_end
    return DiffusionConfig(schedule.name, schedule.num_timesteps, first, final, space, **own)


def require_meaning(parameterization: str, schedule: NoiseSchedule) -> None:
    """Refuse a network that predicts eps where x_{T-1} is pure noise: its eps says nothing about x_0 there.

    Raises:
        UserError: names the parameterization.
    """
    if parameterization == "eps" and schedule.ends_in_noise:
        raise UserError(
            "parameterization: eps says nothing about x_0 at t = T-1 of a process with rescale_betas_zero_snr, where "
            "x_t is pure noise; choose v or x0"
        )


def shape_of(network: nn.Module, shape: Sequence[int] | None, like: "DiffusionModel | None") -> tuple[int, int, int]:
    """(C,H,W) of a state: as given, as in another model, or as in the network.

    Raises:
        UserError: it is unknown, or the network has another one.
    """
    channels, side = getattr(network, "in_channels", None), getattr(network, "image_size", None)
    own = (channels, side, side) if isinstance(channels, int) and isinstance(side, int) else None
    given = _sizes(shape) if shape is not None else like.shape if like else own
    if given is None:
        raise UserError("shape: the network does not define the shape of its states; give (C,H,W) or like=MODEL")
    if own is not None and own != given:
        raise UserError(f"shape: the network takes states {own}, not {given}")
    return given


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    found = convert(Sequence[int], shape, "shape")
    if len(found) != 3 or min(found) < 1:
        raise UserError(f"shape: expected (C,H,W), each at least 1, got {found}")
    return found[0], found[1], found[2]


LARGEST = 2**62  # PyTorch takes 64-bit seeds, and a sample adds its number


def whole(value: int | None, name: str, least: int) -> int | None:
    """A whole number that a user gives, or None.

    Raises:
        UserError: it is something else, below the least, or above LARGEST.
    """
    number: int | None = convert(int | None, value, name)
    if number is not None and number > LARGEST:
        raise UserError(f"{name}: must be at most {LARGEST}")
    if number is not None and number < least:
        raise UserError(f"{name}: must be at least {least}, got {number}")
    return number


def labels_of(
    network: nn.Module, num_classes: int | None, null_label: int | None, like: "DiffusionModel | None"
) -> tuple[int | None, int | None]:
    """(classes, null label) of a model: as given, as in the network, or as in another model.

    Raises:
        UserError: the network has other ones, or its table has no such null label.
    """
    num_classes, null_label = whole(num_classes, "num_classes", 1), whole(null_label, "null_label", 0)
    defined = hasattr(network, "num_classes")
    own_null: int | None = getattr(network, "null_label", None)
    classes: int | None
    null: int | None
    if defined:
        classes = getattr(network, "num_classes", None)
        if num_classes not in (None, classes):
            raise UserError(f"num_classes: the network has {classes}, not {num_classes}")
        null = own_null if null_label is None else null_label
        if null is None and like is not None and like.null_label is not None and like.null_label < (classes or 0):
            null = like.null_label  # a row of this table beyond the teacher's classes
    else:
        classes = num_classes if num_classes is not None else like.num_classes if like else None
        null = null_label if null_label is not None else like.null_label if like else None
    rows = 0 if classes is None else classes + (own_null is not None or not defined)
    if null is not None and null >= rows:
        raise UserError(f"null_label: {null} is outside the network's table of {rows} labels")
    return classes, null


def remembered(network: nn.Module) -> NetworkConfig:
    """Target and params of a network: what it was built from, or the name of the user's class."""
    kind = type(network)
    target = next((name for name, known in NETWORKS.items() if known is kind), f"{kind.__module__}.{kind.__qualname__}")
    return NetworkConfig(target, dict(getattr(network, "arguments", {})))


def open_codec(model: "DiffusionModel") -> LatentCodec:
    """The first stage of a latent model.

    Raises:
        UserError: the model names none, or its latents have another shape.
    """
    stage = model.first_stage
    if stage is None:
        raise UserError(f"first_stage: {model.path or 'the model'} does not name its first stage; give its path")
    codec = stage.codec(model.shape[1], resolve_precision(model.precision, model.device))
    for what, own, theirs in (
        ("{} latent channels", model.shape[0], codec.latent_channels),
        ("latents of side {}", model.shape[1], codec.latent_size),
    ):
        if own != theirs:
            raise UserError(f"first_stage: {stage.path} makes {what.format(theirs)}, the model has {own}")
    return codec


@cache
def table_of(labels: tuple[int, ...], device: torch.device) -> Tensor:
    """Labels as a tensor on a device, copied there once."""
    with torch.inference_mode(False):  # a training needs it too
        return torch.tensor(labels, device=device)
