"""A model with other attributes: what may change, and what follows from a change."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.config.schema import DiffusionConfig, NetworkConfig
from ldm_dkdm.device import PRECISIONS
from ldm_dkdm.diffusion.process import PARAMETERIZATIONS
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, nearest, pick
from ldm_dkdm.files import expanded
from ldm_dkdm.model.arguments import network_of
from ldm_dkdm.model.facts import labels_of, process_of, remembered, require_meaning, shape_of, whole
from ldm_dkdm.model.guidance import require_guidance
from ldm_dkdm.networks import UNet
from ldm_dkdm.networks.scaling import parse_budget, unet_within_budget

if TYPE_CHECKING:
    from ldm_dkdm.model.diffusion_model import DiffusionModel

# attribute -> the class that its value has, where the value is not checked otherwise
CHANGEABLE: dict[str, type | None] = {
    "guidance": None,
    "precision": None,
    "parameterization": None,
    "schedule": NoiseSchedule,
    "space": None,
    "diffusion": DiffusionConfig,
    "shape": None,
    "num_classes": None,
    "null_label": None,
    "first_stage": None,
    "network": nn.Module,
    "node": NetworkConfig,
    "info": Mapping,
    "hints": None,
    "described": None,
}


def changed(model: "DiffusionModel", attributes: Mapping[str, Any]) -> "DiffusionModel":
    """A copy of a model with other attributes and all that follows from them; the network is shared.

    Raises:
        UserError: an attribute that cannot change, or a value that does not fit; the message names it.
    """
    _require_changeable(attributes)
    own = copy.copy(model)
    for name in ("guidance", "precision", "parameterization", "network", "node", "info", "hints", "described"):
        setattr(own, name, attributes.get(name, getattr(model, name)))
    own.network = network_of(own.network)
    pick(PRECISIONS, own.precision, "precision")
    pick(PARAMETERIZATIONS, own.parameterization, "parameterization")
    if type(own.network) is not type(model.network) and "node" not in attributes:
        own.node = remembered(own.network)
    own.node = replace(own.node, parameterization=own.parameterization)
    own.diffusion = _process(model, attributes)
    own.schedule = model.schedule if own.diffusion == model.diffusion else schedule_of(own.diffusion)
    require_meaning(own.parameterization, own.schedule)
    own.shape = shape_of(own.network, attributes.get("shape", model.shape), None)
    own.num_classes, own.null_label = _labels(own, attributes)
    own.first_stage = stage_of(attributes.get("first_stage", model.first_stage), own.space.encoded)
    if not same_codec(own, model):
        own._codec = None
    require_guidance(own)
    return own


def _require_changeable(attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if name not in CHANGEABLE:
            raise UserError(f"{name}: is not an attribute that can change{nearest(name, CHANGEABLE)}")
        kind = CHANGEABLE[name]
        if kind is not None and not isinstance(value, kind):
            raise UserError(f"{name}: expected a {kind.__name__}, got {value!r}")
    if "diffusion" in attributes and {"schedule", "space"} & set(attributes):
        raise UserError("diffusion: already says schedule and space; give either")


def _process(model: "DiffusionModel", attributes: Mapping[str, Any]) -> DiffusionConfig:
    if "diffusion" in attributes:
        found: DiffusionConfig = attributes["diffusion"]
        return found
    return process_of(attributes.get("schedule"), attributes.get("space"), model)


def _labels(model: "DiffusionModel", attributes: Mapping[str, Any]) -> tuple[int | None, int | None]:
    if not {"num_classes", "null_label", "network"} & set(attributes):
        return model.num_classes, model.null_label
    classes = attributes.get("num_classes", model.num_classes)
    return labels_of(model.network, classes, attributes.get("null_label", classes and model.null_label), None)


def stage_of(given: FirstStageSource | str | Path | None, encoded: bool) -> FirstStageSource | None:
    """The first stage of a model, by its path or its description; None where the states are images.

    Raises:
        UserError: neither of them, or a path where the states are images.
    """
    if given is not None and not isinstance(given, (str, Path, FirstStageSource)):
        raise UserError(f"first_stage: expected a path, got {given!r}")
    if isinstance(given, (str, Path)) and not encoded:
        raise UserError("first_stage: pixel space has none; leave it out, or set space to latent")
    if given is None or not encoded:
        return None
    return given if isinstance(given, FirstStageSource) else FirstStageSource(expanded(given))


def same_codec(one: "DiffusionModel", other: "DiffusionModel") -> bool:
    """Whether the codec that one model has opened serves another: same space, shape and first stage."""
    own, theirs = ((model.diffusion.space, model.shape, model.first_stage) for model in (one, other))
    return own == theirs


def narrowed_node(
    model: "DiffusionModel", budget: str | int, parameterization: str | None, norm_groups: int | None
) -> NetworkConfig:
    """What `DiffusionModel.narrowed` builds; errors as there."""
    if not isinstance(model.network, UNet):
        raise UserError("budget: only a UNet can be narrowed, not this network; make the student yourself")
    groups = whole(norm_groups, "norm_groups", 1)
    params = {**model.node.params, **({} if groups is None else {"norm_groups": groups})}
    params = unet_within_budget(params, parse_budget(budget))
    return NetworkConfig("ldm_dkdm.networks.UNet", params, parameterization or model.parameterization)
