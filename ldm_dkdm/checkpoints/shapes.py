"""Named tensors: count blocks, strip prefixes, copy; plain containers for JSON and YAML."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TOO_FEW = (KeyError, IndexError, ValueError, ZeroDivisionError)  # raised by missing tensors and odd shapes


def count_blocks(tensors: Mapping[str, Tensor], part: str) -> int:
    """Number of blocks `part.0`, `part.1`, ...

    Raises:
        ValueError: a number is missing.
    """
    place = len(part.split("."))
    indices = {int(name.split(".")[place]) for name in tensors if name.startswith(f"{part}.")}
    if indices != set(range(len(indices))):
        raise ValueError(f"{part} lacks blocks: it goes up to {max(indices)}, but there are {len(indices)}")
    return len(indices)


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each in memory of its own, as files hold them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def plain(tree: Any) -> Any:
    """Mappings and sequences as dictionaries and lists, for JSON and YAML."""
    if isinstance(tree, Mapping):
        return {str(key): plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
