"""Tensors of diffusers' networks and of ours: names, shapes, and query, key and value."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.config.registry import Targets, build
from ldm_dkdm.errors import UserError

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def split_qkv(value: Tensor, heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Our qkv, (3C,C,1) or (3C,), -> q, k, v as diffusers keeps them, (C,C) or (C,)."""
    value = value.flatten(1) if value.ndim == 3 else value
    rows = value.view(3, heads, -1, *value.shape[1:]) if new_order else value.view(heads, 3, -1, *value.shape[1:])
    parts = rows if new_order else rows.transpose(0, 1)
    return tuple(part.reshape(-1, *value.shape[1:]).contiguous() for part in parts)


def join_qkv(parts: Sequence[Tensor], heads: int, new_order: bool = False) -> Tensor:
    """The inverse of `split_qkv`: weights (3C,C,1) or biases (3C,)."""
    shaped = [part.view(heads, -1, *part.shape[1:]) for part in parts]
    joined = torch.stack(shaped, 0 if new_order else 1).flatten(0, 2)
    return joined[..., None] if joined.ndim == 2 else joined


def require_used(found: Mapping[str, Tensor], used: Collection[str], source: Path) -> None:
    """Refuse tensors that an architecture does not have.

    Raises:
        UserError: names the first few.
    """
    unknown = sorted(set(found) - set(used))
    if unknown:
        raise UserError(f"{source}: holds tensors that this architecture does not have: {', '.join(unknown[:4])}")


def shaped(tensor: Tensor, shape: Sequence[int], name: str, source: Path) -> Tensor:
    """A tensor in a shape that differs only in trailing ones, as those of a 1x1 convolution and a linear layer.

    Raises:
        UserError: it has another shape.
    """
    longest = max(tensor.ndim, len(shape))
    own, wanted = ((*sizes, *[1] * (longest - len(sizes))) for sizes in (tensor.shape, shape))
    if own != wanted:
        raise UserError(f"{source}: {name} is {tuple(tensor.shape)} instead of {tuple(shape)}")
    return tensor.reshape(*shape)


def modern(name: str) -> str:
    """Replace the attention names of older diffusers files by the current ones."""
    for old, new in OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def take(tensors: Mapping[str, Tensor], name: str, source: Path) -> Tensor:
    """A tensor by its name.

    Raises:
        UserError: it is missing.
    """
    if name not in tensors:
        raise UserError(f"{source}: {name} is missing")
    return tensors[name]


def shapes_of(target: str, targets: Targets, params: Mapping[str, Any], source: Path) -> dict[str, torch.Size]:
    """Shapes of a module's tensors, without allocating them.

    Raises:
        UserError: parameters that the module does not take; names the config in the folder `source`.
    """
    with torch.device("meta"):
        module = build({"target": target, "params": params}, targets, f"{source / 'config.json'}: params")
    return {name: value.shape for name, value in module.state_dict().items()}
