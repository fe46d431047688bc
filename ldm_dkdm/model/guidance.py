"""Classifier-free guidance (Ho & Salimans 2022)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_dkdm.config.checked import convert
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks.modes import tensor_of

if TYPE_CHECKING:
    from ldm_dkdm.model.diffusion_model import DiffusionModel


def output_of(model: "DiffusionModel", x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """The network's output at x (B,C,H,W), guided: u + weight (c - u), in one call of twice the batch.

    c is the output with the label, u the one with the null label; a learned variance stays c's. The network takes x in
    the number format of its weights.
    """
    x = x.to(_number_format(model, x))
    if model.diffusion.rescale_timesteps:
        t = t.float() * (1000 / model.schedule.num_timesteps)
    if model.guidance == 1:
        return tensor_of(model.network(x, t, label))
    if label is None:
        raise UserError("label: missing; guidance needs the label of every state")
    assert model.null_label is not None  # ensured by `require_guidance`
    labels = torch.cat([label, torch.full_like(label, model.null_label)])
    with_label, without = tensor_of(model.network(torch.cat([x, x]), torch.cat([t, t]), labels)).chunk(2)
    channels = x.shape[1]
    guided = without[:, :channels] + model.guidance * (with_label[:, :channels] - without[:, :channels])
    return torch.cat([guided, with_label[:, channels:]], 1)


def _number_format(model: "DiffusionModel", x: Tensor) -> torch.dtype:
    """That of all weights; that of x where autocast decides, or they differ, as those that autocast reads as bf16."""
    formats = (weight.dtype for weight in model.network.parameters() if weight.is_floating_point())
    first = next(formats, torch.float32)
    if first == torch.float32 or resolve_precision(model.precision, x.device) != "32":
        return x.dtype
    return first if all(other == first for other in formats) else x.dtype


def rows_of(model: "DiffusionModel", states: int) -> int:
    """Rows of the network's batch in one call of `output_of` on so many states."""
    return states if model.guidance == 1 else 2 * states


def require_guidance(model: "DiffusionModel") -> None:
    """Refuse guidance of a model that cannot be guided.

    Raises:
        UserError: a weight that is not a finite number of at least 0, a student (it has learned the guided prediction),
            no labels, or no null label.
    """
    weight = convert(float, model.guidance, "guidance")
    if weight == 1:
        return
    if not 0 <= weight < math.inf:
        raise UserError(f"guidance: must be a finite number of at least 0, got {weight}")
    if "teacher" in model.info:
        name = model.path or "the model"
        raise UserError(f"guidance: {name} is a student, which has learned the guided prediction; leave it at 1")
    if model.num_classes is None:
        raise UserError("guidance: the model takes no labels; leave it out")
    if model.null_label is None:
        raise UserError(
            f"null_label: guidance needs the label for no class; set it, often null_label={model.num_classes - 1}"
        )
