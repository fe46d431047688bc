"""Read and write model folders: config.yaml, which describes the whole model, and a safetensors file."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.as_built import require_as_built
from ldm_dkdm.checkpoints.card import write_readme
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.first_stages import FirstStageSource, is_first_stage_folder
from ldm_dkdm.checkpoints.reading import read_named_weights
from ldm_dkdm.checkpoints.source import Source, has_config, is_foreign
from ldm_dkdm.checkpoints.writing import SavedModel, refuse_existing
from ldm_dkdm.config.load import RUN_KIND, card_kind, read_card, to_yaml
from ldm_dkdm.config.schema import FirstStageCard, FirstStagePointer, ModelCard
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import replacing_in, write_tensors, write_text
from ldm_dkdm.reporting import decoration

NAME = "model folder"
WEIGHTS = "model.safetensors"


def recognises(source: Source) -> bool:
    """Whether the path is a folder with a config.yaml that is not a run's."""
    if not source.is_folder or not has_config(source.path) or is_foreign(source.path):
        return False
    return card_kind(source.path / "config.yaml") != RUN_KIND


def read(source: Source) -> Contents:
    """Read the model in a folder.

    Raises:
        UserError: no weights, or a card that is damaged or of another kind.
    """
    weights = read_card(source.path / "config.yaml", ModelCard).weights
    return described(source.path, raw=read_named_weights(source.path, weights))


def described(home: Path, format: str = NAME, file: Path | None = None, **weights: Any) -> Contents:
    """The model of a folder's card, with weights of the folder or of another file."""
    card = read_card(home / "config.yaml", ModelCard)
    pointer = card.first_stage
    stage = None
    if pointer is not None:
        stage = FirstStageSource(_pointed_to(home, pointer), pointer.scale_factor, pointer.target, pointer.params)
    return Contents(
        path=home,
        file=file or home / card.weights,
        format=format,
        target=card.network.target,
        params=card.network.params,
        parameterization=card.network.parameterization,
        diffusion=card.diffusion,
        first_stage=stage,
        null_label=card.null_label,
        shape=card.shape,
        num_classes=card.num_classes,
        info=card.info,
        described=True,
        **weights,
    )


def _pointed_to(home: Path, pointer: FirstStagePointer) -> Path:
    """The first stage beside a model folder, or where it was when the folder was written."""
    near = home / pointer.path
    there = None if pointer.absolute is None else Path(pointer.absolute)
    return there if there is not None and there.exists() and not near.exists() else near


def write(model: SavedModel, path: Path) -> None:
    """Write a model into a new or empty folder, which is there whole or not at all.

    Raises:
        UserError: the folder holds files, or is a file; else as `card_of`.
    """
    if not path.is_dir() or any(path.iterdir()):
        refuse_existing(path)
    card = card_of(model, path)
    with replacing_in(path.parent, path.name) as temporary:
        write_model(temporary / path.name, card, model.network.state_dict())


def card_of(model: SavedModel, folder: Path, weights: str = WEIGHTS, **info: Any) -> ModelCard:
    """The config.yaml of a model in `folder`; `info` is added to the model's own.

    Raises:
        UserError: a network of this package that was changed after it was built.
    """
    require_as_built(model.network, model.node)
    known = hasattr(model.network, "image_size")
    return ModelCard(
        weights,
        model.node,
        model.diffusion,
        first_stage=None if model.first_stage is None else pointer_to(model.first_stage, model, folder),
        null_label=model.null_label,
        shape=None if known else list(model.shape),
        num_classes=None if known else model.num_classes,
        info={**model.info, **info},
    )


def known_scale(model: SavedModel) -> float | None:
    """The scale of a model's latents; None in pixel space, and where their first stage is missing."""
    with suppress(UserError):
        return None if model.first_stage is None else latent_scale(model.first_stage, model)
    return None


def latent_scale(stage: FirstStageSource, model: SavedModel) -> float:
    """The scale of a model's latents: the one that is stated, else that of the opened first stage."""
    return (not stage.doubt and stage.scale_factor) or model.codec().scale_factor


def pointer_to(stage: FirstStageSource, model: SavedModel, folder: Path) -> FirstStagePointer:
    """How a card in `folder` points to a first stage."""
    path = os.path.relpath(stage.path.resolve(), folder.resolve())
    scale = latent_scale(stage, model)
    if is_first_stage_folder(stage.path) or (stage.path / "model_index.json").is_file():
        return FirstStagePointer(path, scale, absolute=str(stage.path.resolve()))
    opened = stage if stage.target else stage.opened(model.shape[1])
    return FirstStagePointer(path, scale, opened.target, dict(opened.params), str(stage.path.resolve()))


def write_model(
    folder: Path, card: ModelCard, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write a model folder with its README, each file atomically."""
    write_folder(folder, card, tensors, dtype)
    with decoration(str(folder / "README.md")):
        write_readme(folder, card)


def write_folder(
    folder: Path,
    card: ModelCard | FirstStageCard,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights and config.yaml, each file atomically; the config comes last."""
    write_tensors(folder / card.weights, {k: _stored(v, dtype) for k, v in tensors.items()})
    write_text(folder / "config.yaml", to_yaml(card))


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in memory of its own, since a file cannot hold tied weights."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)


def require_tensors(state: Mapping[str, Any], what: str) -> None:
    """Refuse a state_dict that a weights file cannot hold.

    Args:
        state: a module's state_dict.
        what: begins the message.

    Raises:
        UserError: a value that is not a dense tensor, such as a module's extra state.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            kind = f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{what}: {name} in its state_dict is {kind}; a weights file holds dense tensors only")
