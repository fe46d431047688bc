"""A file or folder whose content is read on first use, once."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_dkdm.checkpoints.ema_names import is_averaged
from ldm_dkdm.checkpoints.reading import (
    file_kind,
    holds_tensors,
    read_content,
    refuse_object,
    select_part,
    tensors_in,
)
from ldm_dkdm.checkpoints.releases import how_to_get, refuse_address
from ldm_dkdm.checkpoints.state_dicts import Weights, find_weights, parts_of, unwrapped
from ldm_dkdm.checkpoints.weight_files import holds_weights, is_index, refuse_shard
from ldm_dkdm.config.load import card_kind, read_yaml
from ldm_dkdm.config.recipes import find_shipped
from ldm_dkdm.errors import UserError, interruptible, unreadable
from ldm_dkdm.files import JSON_BYTES, read_text, require_file

OWN_KEYS = {"weights", "network", "diffusion"}  # keys in the config of a model folder
RUN_KEYS = {"trainer", "logging"}  # keys in the config of a run folder
MODEL_KEYS = OWN_KEYS | {"model"}  # the last is CompVis's
DESCRIPTIONS = ("model_index.json", "config.json", "config.yaml")  # files beside weights that describe them
RUN_MODELS = ("model", "first_stage", "student")  # model folders in a run folder


class Source:
    """A file or folder that may hold a model.

    A run folder means the model in it; the weights of a model folder mean the folder.

    Args:
        path: file or folder; a relative path may name a model that ships with the package, or one in the
            Hub's local cache, OWNER/NAME.
    """

    def __init__(self, path: str | Path) -> None:
        refuse_address(path)
        self.path = home_of(find_shipped(path))
        self._weights: dict[tuple[str, str], Weights] = {}

    @property
    def is_folder(self) -> bool:
        """Whether the path is a folder."""
        return self.path.is_dir()

    @cached_property
    def kind(self) -> str:
        """`folder`, `index` (of shards), or the kind of the file by its content: `torch`, `safetensors`, `pickle`.

        Raises:
            UserError: no such file, one of several shards, a description, or a file of another kind; says which.
        """
        if self.is_folder:
            return "folder"
        require_file(self.path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such checkpoint file; {how_to_get(self.path)}")
        if is_index(self.path):
            return "index"
        refuse_shard(self.path)
        if self.path.name in DESCRIPTIONS:
            raise UserError(f"{self.path}: describes a model and holds no weights; name its folder, {self.path.parent}")
        return file_kind(self.path)

    @cached_property
    def content(self) -> Any:
        """The whole content of a file, usually a dictionary; unknown classes are inert."""
        return None if self.kind == "folder" else read_content(self.path)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a file in its usual part, without what wrappers leave in their names."""
        return {} if self.kind in ("folder", "index") else self.part(None)

    def weights(self, signature: tuple[str, str]) -> Weights:
        """The network with two given names anywhere in a file, and its EMA; see `find_weights`."""
        if self.kind == "folder":
            return Weights()
        if signature not in self._weights:
            self._weights[signature] = find_weights(self.content, signature, self.path)
        return self._weights[signature]

    @property
    def has_unread_ema(self) -> bool:
        """Whether a network that was looked for has an EMA in the file whose form is unknown."""
        return any(found.unread for found in self._weights.values())

    @property
    def several_emas(self) -> str:
        """Why no EMA of a network that was looked for is taken, where the file holds several; else empty."""
        return next((found.several_emas for found in self._weights.values() if found.several_emas), "")

    def part(self, name: str | None) -> dict[str, Tensor]:
        """The tensors in a named part of a file, also without that."""
        if isinstance(self.content, Tensor):
            shape = tuple(self.content.shape)
            raise UserError(f"{self.path}: holds one tensor of shape {shape}, not a network")
        tree = select_part(self.content, name, self.path)
        if not holds_tensors(tree):
            # a list or a number as key often leads to losses and statistics, so named parts go first
            found_parts = list(parts_of(tree, named=True)) or parts_of(tree)
            parts = sorted(found_parts, key=lambda part: is_averaged(part[0]))
            tree = parts[0][1] if parts else tree
        found = tensors_in(tree, self.path)
        if not found:
            refuse_object(tree, self.path)
            raise UserError(f"{self.path}: holds no weights (keys: {', '.join(map(str, list(self.content)[:6]))})")
        return unwrapped(found)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of a safetensors file; empty for any other."""
        if self.kind != "safetensors":
            return {}
        try:
            with interruptible(), safe_open(self.path, framework="pt") as file:
                return file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            fault = f"not a readable safetensors file (is it complete?): {error}"
            raise unreadable(self.path, fault, error) from error

    def holds(self, name: str) -> bool:
        """Whether a folder holds a file of this name."""
        return (self.path / name).is_file()

    def json(self, *names: str) -> dict[str, Any]:
        """The object in a JSON file of the folder.

        Raises:
            UserError: a missing or malformed file.
        """
        return read_json(self.path.joinpath(*names))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: a missing or malformed file, or one that holds no object.
    """
    try:
        tree = json.loads(read_text(path, JSON_BYTES))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing" + (f", a link to {path.readlink()}" * path.is_symlink())) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not a JSON object")
    return tree


def has_config(folder: Path) -> bool:
    """Whether a folder holds a config.yaml, as model folders and run folders do."""
    return (folder / "config.yaml").is_file()


def home_of(path: Path) -> Path:
    """The model folder in a run folder or around a weights file; any other path as it is."""
    if path.is_file() and _weights_of(path.parent) == path.name:
        return path.parent
    return next((path / name for name in RUN_MODELS if has_config(path / name)), _released(path))


def _released(folder: Path) -> Path:
    """The checkpoint beside CompVis's config.yaml in the folder of a release; any other path as it is."""
    files = sorted(folder.glob("*.ckpt")) if folder.is_dir() else []
    return files[0] if len(files) == 1 and has_config(folder) and is_foreign(folder) else folder


def is_foreign(folder: Path) -> bool:
    """Whether a folder's config.yaml belongs to other code: it has none of the keys of this package's folders."""
    try:
        return card_kind(folder / "config.yaml") is None and not OWN_KEYS & set(read_yaml(folder / "config.yaml"))
    except (UserError, OmegaConfBaseException):  # damaged, which the reader says
        return False


def describes_model(folder: Path) -> bool:
    """Whether files in a folder, or in one of its folders, describe a model, by their content.

    A damaged file describes none.
    """
    if any(has_config(folder / name) for name in RUN_MODELS):
        return True
    descriptions = [folder / name for name in DESCRIPTIONS if name.endswith(".json")]
    if any(file.is_file() and _has_class(file) for file in [*descriptions, *folder.glob("*/config.json")]):
        return True
    try:
        return has_config(folder) and _names_model(folder)
    except (UserError, OmegaConfBaseException):
        return False


def _names_model(folder: Path) -> bool:
    """Whether a folder's config.yaml is a model's or a run's: other programs use some of the same keys."""
    tree = cast(dict[str, Any], OmegaConf.to_container(read_yaml(folder / "config.yaml")))
    keys = set(tree)
    if keys >= OWN_KEYS or keys >= RUN_KEYS:
        return True
    if card_kind(folder / "config.yaml") is None and not MODEL_KEYS & keys:
        return False
    if isinstance(tree.get("model"), dict) and "target" in tree["model"]:
        return True
    named = tree.get("weights")
    inside = any(map(holds_weights, (folder, folder / "checkpoints")))
    return inside or (isinstance(named, str) and (folder / named).is_file())


def _has_class(file: Path) -> bool:
    try:
        return "_class_name" in read_json(file)
    except UserError:
        return False


def _weights_of(folder: Path) -> str | None:
    """The weights file that a folder's config names; None without a config of this package."""
    try:
        return read_yaml(folder / "config.yaml").get("weights") if has_config(folder) else None
    except (UserError, OmegaConfBaseException):  # a third-party file
        return None
