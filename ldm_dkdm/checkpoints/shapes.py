"""Named tensors: count blocks, judge channels, strip prefixes, copy; plain containers for JSON and YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.errors import UserError

TOO_FEW = (KeyError, IndexError, ValueError, ZeroDivisionError)  # raised by missing tensors and odd shapes
UPSAMPLER = {"in_channels": 6, "out_channels": 6}  # guided-diffusion's: x and an image, both RGB, -> eps and variance


def count_blocks(tensors: Mapping[str, Tensor], part: str, skipped: Sequence[int] = ()) -> int:
    """Number of blocks `part.0`, `part.1`, ... that have tensors.

    Raises:
        ValueError: a number is missing that is not one of `skipped`.
    """
    indices = _indices(tensors, part)
    if indices | set(skipped) != set(range(len(indices) + len(skipped))):
        raise ValueError(f"{part} lacks blocks: it goes up to {max(indices)}, but there are {len(indices)}")
    return len(indices)


def missing_blocks(tensors: Mapping[str, Tensor], part: str) -> list[int]:
    """Numbers below the largest one of `part.0`, `part.1`, ... without tensors; none where most are missing."""
    indices = _indices(tensors, part)
    if max(indices, default=0) > 2 * len(indices):  # files are not trusted
        return []
    return sorted(set(range(max(indices, default=-1) + 1)) - indices)


def _indices(tensors: Mapping[str, Tensor], part: str) -> set[int]:
    place = len(part.split("."))
    return {int(name.split(".")[place]) for name in tensors if name.startswith(f"{part}.")}


def refuse_concatenated(inputs: Any, outputs: Any, source: Path) -> None:
    """Refuse a network with fewer channels out than in: the others hold an image beside the state.

    Raises:
        UserError: names the file.
    """
    if isinstance(inputs, int) and isinstance(outputs, int) and outputs < inputs:
        raise UserError(
            f"{source}: its network is conditioned on an image that is concatenated to its input ({inputs} channels "
            f"in, {outputs} out: super-resolution or inpainting), which is not supported"
        )


def multiples(widths: Sequence[int], base: int) -> list[int | float]:
    """Widths in units of another width; whole numbers where they are whole."""
    return [width / base if width % base else width // base for width in widths]


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
