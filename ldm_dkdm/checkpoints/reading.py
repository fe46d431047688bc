"""Read tensors from files without running code in them."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor

from ldm_dkdm.checkpoints.arrays import PickledArray
from ldm_dkdm.checkpoints.hashes import read_safetensors
from ldm_dkdm.checkpoints.pickles import TORCH_MAGIC, Inert, read_array_pickle, read_torch_file
from ldm_dkdm.checkpoints.weight_files import files_of, holds_weights, is_index, shards_of, weights_in
from ldm_dkdm.config.load import RUN_KIND, card_kind, read_yaml
from ldm_dkdm.errors import UserError, blaming, interruptible, unreadable
from ldm_dkdm.files import expanded, require_file

AGAIN = "; download it again"
HEADER = 10_000_000  # bytes of a safetensors header; one of 10,000 tensors has 1 MB
PARTS = ("state_dict", "ema", "model")  # keys in Lightning's and CompVis's files; in DiT's, EMA first
SIGNATURES = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"\x1f\x8b": "is a gzip archive; unpack it first",
    b"BZh": "is a bzip2 archive; unpack it first",
    b"\xfd7zXZ\x00": "is an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "is a zstd archive; unpack it first",
    b"7z\xbc\xaf": "is a 7z archive; unpack it first",
    b"Rar!": "is a RAR archive; unpack it first",
    b"\x89HDF": "is an HDF5 file (Keras?); a PyTorch or safetensors file is needed",
    b"GGUF": "is a GGUF file; a PyTorch or safetensors file is needed",
    b"\x93NUMPY": "is a NumPy array, not a checkpoint",
    b"\x89PNG": "is an image, not a checkpoint",
    b"\xff\xd8\xff": "is an image, not a checkpoint",
}


def read_tensors(path: str | Path, part: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint -> {name: tensor}, on the CPU, memory-mapped where possible.

    The content decides the format, not the file's ending: torch's zip and legacy formats (CompVis, Lightning,
    guided-diffusion, DDPM-IP, DiT), safetensors, a plain pickle of arrays (a reference pool cache), a diffusers
    component's folder or its whole pipeline (names then begin with the component: `unet.conv_in.weight`), a model
    folder, a run folder, which means the model in it. A file that is one tensor gives it under the file's name.

    Args:
        path: file or folder.
        part: a nested part to take, for example `current_model_state` in training checkpoints, whose
            `state_dict` holds the EMA weights; by default `state_dict`, else `ema`, else `model`, else the top level.

    Raises:
        UserError: no such file, an unknown format, no such part, or a pickle that asks for more than tensors.
    """
    path = expanded(path)
    if (path / "model_index.json").is_file():
        return _of_components(path, part)
    if path.is_dir():
        return read_tensors(_weights_of(path), part)
    if is_index(path) and path.is_file():
        listed = shards_of(path)
        return {
            name: tensor
            for shard in files_of(path)
            for name, tensor in read_tensors(shard, part).items()
            if listed.get(name, shard.name) == shard.name  # another shard may hold a copy
        }
    with blaming(path):
        content = read_content(path)
        if part is not None:
            _require_part(content, part, path)
        if isinstance(content, Tensor):
            return {path.stem: as_tensor(content, path.stem, path)}
        tree = select_part(content, part, path)
        tensors = tensors_in(tree, path)
        if not tensors:
            refuse_object(tree, path)
            raise UserError(f"{path}: holds no tensors (keys: {', '.join(map(str, list(tree)[:8]))})")
        return tensors


def _weights_of(folder: Path) -> Path:
    """The weights file that the readers of models take from a folder.

    Raises:
        UserError: none, several, or a run without a model.
    """
    from ldm_dkdm.checkpoints.source import home_of  # imports this module

    home = home_of(folder)
    if home.is_file():
        return home
    try:
        kind, named = card_kind(home / "config.yaml"), read_yaml(home / "config.yaml").get("weights")
    except (UserError, OmegaConfBaseException):  # no config, or a third-party file
        kind, named = None, None
    begun = (home / "checkpoints").is_dir() and (any(home.glob("checkpoints/step=*.ckpt")) or not holds_weights(home))
    if kind == RUN_KIND and begun:
        raise UserError(f"{folder}: is a run that has written no model; --resume {folder} goes on with it")
    plain = kind not in (None, RUN_KIND) and isinstance(named, str) and Path(named).name == named
    return home / named if plain and (home / named).is_file() else weights_in(home)


def _require_part(content: Any, part: str, path: Path) -> None:
    """Refuse a part that a file does not have.

    Raises:
        UserError: names those that it has.
    """
    parts = (
        {name: value for name, value in content.items() if holds_tensors(value)} if isinstance(content, dict) else {}
    )
    if part not in parts:
        known = f"it has {', '.join(map(str, parts))}" if parts else "its tensors are in no part; leave part out"
        raise UserError(f"part: {path} has no part {part!r} with tensors; {known}")


def select_part(content: Any, part: str | None, path: Path) -> Mapping[Any, Any]:
    """The dictionary of tensors within what a file holds."""
    if not isinstance(content, Mapping):
        refuse_object(content, path)
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    if set(content) == {"state", "param_groups"}:
        raise UserError(f"{path}: is an optimizer's state (an optNNNNNN.pt), not weights; take ema_*.pt or model*.pt")
    names = PARTS if part is None else (part,)
    return next((content[name] for name in names if holds_tensors(content.get(name))), content)


def refuse_object(content: Any, path: Path) -> None:
    """Refuse an object of a class that is not rebuilt here, alone or in a dictionary without weights.

    Raises:
        UserError: names the class, and its key.
    """
    items = content.items() if isinstance(content, Mapping) else [(None, content)]
    for key, value in items:
        if isinstance(value, Inert):
            where = "" if key is None else f" under {key!r}"
            raise UserError(
                f"{path}: holds an object of {value.stands_for}{where}, whose code would have to run; save its "
                "state_dict() with torch.save"
            )


def holds_tensors(part: Any) -> bool:
    """Whether a part of a file's content is a dictionary with tensors or arrays among its values."""
    return isinstance(part, Mapping) and any(isinstance(value, (Tensor, PickledArray)) for value in part.values())


def read_content(path: Path) -> Any:
    """The whole content of a checkpoint file, usually a dictionary; unknown classes are inert."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    kind = file_kind(path)
    with interruptible():
        if kind == "safetensors":
            try:
                return read_safetensors(path)[0]
            except UserError:
                raise
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                fault = f"not a readable safetensors file (is it complete?): {error}"
                raise unreadable(path, fault, error) from error
        return read_torch_file(path) if kind == "torch" else read_array_pickle(path)


def file_kind(path: Path) -> str:
    """`torch`, `safetensors` or `pickle`, by content.

    Raises:
        UserError: another kind of file; says which.
    """
    require_file(path)
    if is_index(path):
        raise UserError(
            f"{path}: is an index of shards; name the folder that holds it and the config.json of its network"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path}: is empty{AGAIN}")
    for signature, meaning in SIGNATURES.items():
        if head.startswith(signature):
            raise UserError(f"{path}: {meaning}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive; unpack it first")
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head.startswith(TORCH_MAGIC[: len(head)]):
        return "torch"
    if _is_safetensors(head, size, path):
        return "safetensors"
    if head[0] == 0x80 and len(head) > 2 and head[1] <= 5:
        return "pickle"
    raise UserError(f"{path}: {_describe_text(head)}")


def _kind_of_zip(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a readable checkpoint, it is truncated{AGAIN}")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    if any(name.endswith("constants.pkl") for name in names) and any("/code/" in name for name in names):
        raise UserError(f"{path}: is a TorchScript program, not weights; save its state_dict() instead")
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        if packed:
            raise UserError(f"{path}: is compressed, unlike the files of torch.save; unpack and save it again")
        return "torch"
    if any(name.endswith(".npy") for name in names):
        raise UserError(f"{path}: is an .npz of arrays (images or statistics), not a checkpoint")
    raise UserError(f"{path}: is an archive ({', '.join(names[:3]) or 'empty'}), not a checkpoint; unpack it first")


def _is_safetensors(head: bytes, size: int, path: Path) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    if length > 100_000_000:
        return False
    if length > HEADER:
        raise UserError(f"{path}: its header of {length / 1e6:.0f} MB names more than any network has")
    if 8 + length > size:
        raise UserError(f"{path}: not a readable safetensors file, its header is truncated{AGAIN}")
    return True


def _describe_text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()  # a mark of the byte order
    if start.startswith((b"<!doctype", b"<!--", b"<html", b"<?xml", b"<head")):
        return "is a web page saved as a checkpoint; the download needs a browser, a login or another address"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"is text, not a checkpoint (it begins with {head[:24].decode()!r})"
    return f"is not in a known checkpoint format (it begins with {head[:8]!r})"


def _of_components(pipeline: Path, part: str | None) -> dict[str, Tensor]:
    """The tensors of all components of a diffusers pipeline."""
    folders = sorted(folder for folder in pipeline.iterdir() if folder.is_dir() and holds_weights(folder))
    if not folders and holds_weights(pipeline):  # the first layout of diffusers, with its parts in the root
        return read_tensors(weights_in(pipeline), part)
    if not folders:
        raise UserError(f"{pipeline}: is a diffusers pipeline without weights")
    return {
        f"{folder.name}.{name}": tensor for folder in folders for name, tensor in read_tensors(folder, part).items()
    }


def read_named_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of the weights file that a folder's config names.

    Raises:
        UserError: no such file, or a name that leads out of the folder.
    """
    if Path(name).name != name:
        raise UserError(f"{folder}/config.yaml: weights: '{name}' must be a file name in the same folder")
    if not (folder / name).is_file():
        raise UserError(f"{folder / name}: missing; the folder {folder} has a config but no weights")
    return read_tensors(folder / name)


def tensors_in(tree: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors and arrays among the values of a dictionary; `path` is for messages.

    Raises:
        UserError: a tensor without a name, or without numbers of its own: sparse, quantised, nested, on no
            device, one number repeated.
    """
    found = {}
    for name, value in tree.items():
        if isinstance(value, (Tensor, PickledArray)):
            if not isinstance(name, str):
                raise UserError(f"{path}: holds a tensor under {name!r}, which is not a name")
            found[name] = as_tensor(value, name, path)
    return found


def as_tensor(value: Tensor | PickledArray, name: object, path: Path) -> Tensor:
    """A plain dense tensor; errors as `tensors_in`."""
    if isinstance(value, PickledArray):
        try:
            return value.tensor
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {name} is not a readable array: {error}") from error
    value = Tensor.detach(value)  # without the attributes that a pickle can set on it, such as a number for a method
    kinds = {
        "sparse": value.layout != torch.strided and not value.is_nested,
        "nested": value.is_nested,
        "empty (on the meta device)": value.is_meta,
        "quantised": value.is_quantized,
    }
    odd = [kind for kind, found in kinds.items() if found]
    if odd:
        raise UserError(f"{path}: {name} is a tensor of another kind ({odd[0]}), not weights")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: {name} repeats a few numbers as {tuple(value.shape)}, which no weights do")
    return value
