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

GUIDANCE = "teacher_guidance"  # key of a student's card


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
        UserError: a weight that is not a finite number of at least 0, a student that has learned the guided
            prediction or no null label, no labels, or no null label.
    """
    weight = convert(float, model.guidance, "guidance")
    if weight == 1:
        return
    if not 0 <= weight < math.inf:
        raise UserError(f"guidance: must be a finite number of at least 0, got {weight}")
    require_unguided(model, "guidance", str(model.path or "the model"))
    if model.num_classes is None:
        raise UserError("guidance: the model takes no labels; leave it out")
    if model.null_label is None:
        raise UserError(
            "null_label: guidance needs the label for no class, which only a network trained with such a label has; "
            "set it for one, and leave guidance at 1 for a network trained on all its classes"
        )


def require_unguided(model: "DiffusionModel", name: str, shown: str) -> None:
    """Refuse to guide a student of a guided teacher, and one whose distillation trained no null label.

    Args:
        model: any model.
        name: of the flag or parameter.
        shown: the model's name.

    Raises:
        UserError: names the flag and the model.
    """
    if "teacher" not in model.info:
        return
    if model.info.get(GUIDANCE) != 1:  # absent from cards of earlier versions
        raise UserError(f"{name}: {shown} is a student, which has learned the guided prediction; leave it at 1")
    if model.num_classes is not None and getattr(model.network, "null_label", None) is None:
        raise UserError(f"{name}: {shown} is a student, trained on no label for no class; leave it at 1")


def learned_guidance(teacher: "DiffusionModel") -> dict[str, float]:
    """The weight that a student of this teacher learns, for its card; nothing where the teacher's own is not known."""
    if "teacher" not in teacher.info:
        return {GUIDANCE: teacher.guidance}
    if GUIDANCE not in teacher.info:
        return {}
    own = teacher.info[GUIDANCE]
    return {GUIDANCE: teacher.guidance if own == 1 else own}
