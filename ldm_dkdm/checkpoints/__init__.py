"""The only readers and writers of checkpoint files: one module per format, listed in FORMATS."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ldm_dkdm.checkpoints import adm, compvis, described, diffusers, dit, model_folder, run_checkpoint
from ldm_dkdm.checkpoints.averaging import KIND
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.hints import Hints
from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.checkpoints.strangers import super_resolution, what_else
from ldm_dkdm.checkpoints.writing import SavedModel
from ldm_dkdm.errors import UserError, blaming

__all__ = ["FORMATS", "Contents", "Format", "Hints", "Source", "read", "read_tensors", "super_resolution"]


class Format(Protocol):
    """Interface of a format's module."""

    NAME: str

    def recognises(self, source: Source) -> bool:
        """Whether the source is of this format; the first format that says so reads it."""

    def read(self, source: Source) -> Contents:
        """Read the model's description and weights."""

    def write(self, model: SavedModel, path: Path) -> None:
        """Write a model, or raise a `UserError` that says why not."""


FORMATS: dict[str, Format] = {
    "folder": model_folder,
    "diffusers": diffusers,
    "safetensors": described,
    "checkpoint": run_checkpoint,
    "compvis": compvis,
    "adm": adm,
    "dit": dit,
}  # `recognises` is called in this order, with ANYWHERE last
ANYWHERE = (adm, dit)  # they are looked for behind any prefix, so every other format is asked first


def read(source: Source) -> Contents:
    """Find the format of a source and read the diffusion model in it.

    Raises:
        UserError: a missing or unreadable file, or one without a diffusion model; says what it holds.
    """
    with blaming(source.path):
        _ = source.kind  # refuses a file of another kind than weights
        asked = sorted(FORMATS.values(), key=lambda format: format in ANYWHERE)
        found = next((format for format in asked if format.recognises(source)), None)
        if found is None:
            raise UserError(f"{source.path}: {what_else(source)}")
        contents = found.read(source)
        if source.has_unread_ema or source.several_emas:  # the raw ones are read, whatever the file is called
            return replace(contents, info={**contents.info, KIND: "raw"}, several_emas=source.several_emas)
        return contents.named()
