"""Tensors out of files, without ever running what a file contains."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm_dkdm.errors import UserError

# Lightning keyed callback states by class in its early releases; this inert class stands in for it.
LIGHTNING_GLOBALS = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class Inert:
    """Takes the place of a class that a pickle names; it does nothing."""


def read_tensors(path: str | Path, part: str = "state_dict") -> dict[str, Tensor]:
    """Read a .safetensors, .ckpt or .pt file -> {name: tensor}, on the CPU, memory-mapped where possible.

    A nested `part` is taken out of a Lightning checkpoint (in ours `state_dict` holds the EMA weights and
    `current_model_state` the raw ones); other entries are left. A file that is one tensor gives it under the
    file's name.

    Raises:
        UserError: no such file, an unknown format, or a pickle that asks for more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = _read_pickle(path)
    if isinstance(content, Tensor):
        return {path.stem: content}
    tree = content.get(part, content) if isinstance(content, dict) else content
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in tree.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors (keys: {', '.join(map(str, list(tree)[:8]))})")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, name) for name in LIGHTNING_GLOBALS]):
            warnings.simplefilter("ignore")  # the error below says it in one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: refused, the file is damaged or asks to run code: {first}") from error
    except Exception as error:  # a damaged pickle can raise anything; nothing of it has run
        raise UserError(f"{path}: not a readable checkpoint (is the download complete?): {error!r}") from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
