"""Refuse a CompVis config that contradicts the checkpoint beside it, where CompVis's code would not go on unnoticed."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.checkpoints.compvis_config import CompVisConfig
from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks import NETWORKS

UNET = "UNetModel"  # the class of CompVis's UNet, in whatever module a fork keeps it
UNCONDITIONAL = "__is_unconditional__"  # a `cond_stage_config` beside which CompVis's code drops `conditioning_key`
TOLERANCE = 1e-3  # relative, between a scale in a config and one that is stored in half precision


def require_agreement(
    config: CompVisConfig, shown: Mapping[str, Any], stored_scale: Tensor | None, checkpoint: Path
) -> None:
    """Refuse what a config says otherwise than the tensors of its network and the stored scale.

    Args:
        config: the one beside the checkpoint.
        shown: parameters of the UNet that the tensors show.
        stored_scale: `scale_factor` in the checkpoint, where there is one.
        checkpoint: for messages.

    Raises:
        UserError: names the file and the key.
    """
    _require_target(config)
    classes, own = config.unet.get("num_classes"), shown.get("num_classes")
    if classes is not None and plain(classes) != own:
        raise _differs(config, "unet_config.params.num_classes", f"the UNet of {checkpoint} has {own or 'no labels'}")
    channels = config.model.get("channels")
    if channels is not None and str(channels) != str(shown["in_channels"]):
        raise _differs(config, "channels", f"the UNet of {checkpoint} has {shown['in_channels']}")
    _require_conditioning(config, own, checkpoint)
    given, stored = config.scale_factor, _number(stored_scale)  # without scale_by_std CompVis's code stores none
    if given is not None and stored is not None and not math.isclose(given, stored, rel_tol=TOLERANCE):
        raise _differs(config, "scale_factor", f"{checkpoint} stores {stored:g}; correct it or set scale_by_std")


def _require_target(config: CompVisConfig) -> None:
    node = config.model["unet_config"]
    target = node.get("target") if isinstance(node, Mapping) else None
    if target is not None and target not in NETWORKS and str(target).rpartition(".")[2] != UNET:
        raise UserError(f"{config.file}: model.params.unet_config.target: {target!r} is not supported, only a {UNET}")


def _require_conditioning(config: CompVisConfig, classes: int | None, checkpoint: Path) -> None:
    """Refuse a condition that the UNet does not take; CompVis's code drops the key of an unconditional model."""
    own = (None,) if classes is None else (None, "adm")
    unconditional = config.model.get("cond_stage_config") == UNCONDITIONAL
    if not unconditional and config.model.get("conditioning_key") not in own:
        raise _differs(config, "conditioning_key", f"the UNet of {checkpoint} takes no such condition")


def _number(stored: Tensor | None) -> float | None:
    """A stored scale; None for what is not a number above 0, which is refused or replaced where it is used."""
    if stored is None or stored.numel() != 1 or not stored.is_floating_point():
        return None
    return stored.item() if 0 < stored.item() < math.inf else None


def _differs(config: CompVisConfig, key: str, but: str) -> UserError:
    value: Any = config.model
    for name in key.split("."):
        value = value[name]
    return UserError(f"{config.file}: model.params.{key}: {plain(value)!r}, but {but}; or move {config.file.name} away")
