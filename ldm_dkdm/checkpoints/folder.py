"""Our own model folders: config.yaml and a safetensors file; the config describes the model whole."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.config.load import card_kind, read_card, read_yaml, to_yaml
from ldm_dkdm.config.schema import FirstStageCard, ModelCard
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import write_tensors, write_text

Card = TypeVar("Card", ModelCard, FirstStageCard)


def is_model_folder(path: Path) -> bool:
    """Whether the path is a folder of ours."""
    return (path / "config.yaml").is_file()


def is_first_stage(path: Path) -> bool:
    """Whether the path is a first stage's folder."""
    return is_model_folder(path) and card_kind(path / "config.yaml") == FirstStageCard.KIND


def home_of(path: Path) -> Path:
    """The model folder that a path means: a run's folder means its student/, a folder's weights mean the folder."""
    if path.is_file() and _weights_of(path.parent) == path.name:
        return path.parent
    return path / "student" if is_model_folder(path / "student") else path


def _weights_of(folder: Path) -> str | None:
    """The weights that a folder's config names; None where it has no config of ours."""
    try:
        return read_yaml(folder / "config.yaml").get("weights") if is_model_folder(folder) else None
    except (UserError, OmegaConfBaseException):  # somebody else's file
        return None


def read_folder(folder: Path, schema: type[Card]) -> tuple[Card, dict[str, Tensor]]:
    """Read a model folder -> its card and its tensors."""
    card = read_card(folder / "config.yaml", schema)
    weights = folder / card.weights
    if Path(card.weights).name != card.weights:
        raise UserError(f"{folder}/config.yaml: weights: '{card.weights}' must be a file name in the same folder")
    if not weights.is_file():
        raise UserError(f"{weights}: missing; the folder {folder} has a config but no weights")
    return card, read_tensors(weights)


def read_card_of(folder: Path, schema: type[Card]) -> Card:
    """The card of a model folder, without its tensors."""
    return read_card(folder / "config.yaml", schema)


def write_folder(
    folder: Path,
    card: ModelCard | FirstStageCard,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model folder, each file whole or not at all; the config comes last."""
    stored = {
        k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous() for k, v in tensors.items()
    }
    write_tensors(folder / card.weights, stored)
    write_text(folder / "config.yaml", to_yaml(card))


def relative_to_folder(path: Path, folder: Path) -> str:
    """How a card in `folder` points to `path`."""
    return os.path.relpath(path.resolve(), folder.resolve())
