"""Load weights strictly: every key fits, or the error lists those that do not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm.checkpoints.state_dicts import unwrapped
from ldm_dkdm.config.registry import Targets, Unfilled, build, is_own
from ldm_dkdm.device import usual_tensors
from ldm_dkdm.errors import UserError
from ldm_dkdm.rng import forked_rng


def build_loaded(node: Any, where: str, targets: Targets, tensors: Mapping[str, Tensor], source: str | Path) -> Any:
    """Build the module that a config node describes, with its weights.

    Names and shapes are compared before the module takes any memory. The user's own classes are built as usual:
    they may compute tensors that no file holds.

    Args:
        node, where, targets: as in `build`.
        tensors, source: as in `load_strictly`.

    Raises:
        UserError: what `build` and `load_strictly` refuse.
    """
    if is_own(targets.get(node.target, nn.Module)):
        with usual_tensors(), torch.device("meta"), Unfilled():
            module = build(node, targets, where)
        tensors = _named_as_in(module, tensors)
        require_keys(module, tensors, source)
        own = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cpu")
            for name, value in module.state_dict().items()
        }
        module.load_state_dict(own, assign=True)
    else:
        with forked_rng(0), usual_tensors():
            module = build(node, targets, where)
    load_strictly(module, tensors, source)
    return module


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy tensors into the module's parameters and buffers, casting to their type.

    Raises:
        UserError: missing, unexpected or mis-shaped keys, of which it lists the first few; values that are not
            finite; integer tensors in place of weights.
    """
    tensors = _named_as_in(module, tensors)
    require_keys(module, tensors, source)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not tensors[name].is_floating_point():
            raise UserError(f"{source}: {name} holds {tensors[name].dtype}, not weights; quantised files do not work")
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{source}: {name} holds values that are not finite; the file is damaged")
    module.load_state_dict(dict(tensors))


def _named_as_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under a module's names where only what wrappers leave in names differs, such as `_orig_mod.`."""
    names = list(module.state_dict())
    if tensors.keys() == set(names):
        return tensors
    plain, own = unwrapped(tensors), dict[str, str]()
    for name in names:
        own |= dict.fromkeys(unwrapped({name: None}), name)
    return {own[name]: value for name, value in plain.items()} if plain.keys() == own.keys() else tensors


def require_keys(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse tensors whose names or shapes are not the module's.

    Raises:
        UserError: missing, unexpected or mis-shaped keys, of which it lists the first few.
    """
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in tensors],
        "unexpected": [k for k in tensors if k not in own],
        "of another shape": [
            f"{k} {tuple(tensors[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own
            if k in tensors and tensors[k].shape != own[k].shape
        ],
    }
    found = [f"{len(keys)} keys {kind}: {', '.join(keys[:4])}" for kind, keys in problems.items() if keys]
    if found:
        raise UserError(f"{source}: does not fit this {type(module).__name__}; {'; '.join(found)}")
