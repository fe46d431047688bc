"""The model that a run makes, as a folder that describes itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch

from ldm_dkdm.checkpoints.folder import relative_to_folder, write_folder
from ldm_dkdm.config.schema import FirstStagePointer, ModelCard
from ldm_dkdm.training.card import write_readme
from ldm_dkdm.training.ema import averaged


def export_on_save(
    folder: Path, card: ModelCard, pointer: FirstStagePointer | None, dtype: str
) -> Callable[[L.Trainer], None]:
    """A function that writes the EMA weights of a trainer and the card into `folder`."""
    relative = pointer and replace(pointer, path=relative_to_folder(Path(pointer.path), folder))

    def export(trainer: L.Trainer) -> None:
        info = {**card.info, "step": trainer.global_step, "max_steps": trainer.max_steps}
        network = averaged(trainer.callbacks).network
        described = replace(card, first_stage=relative, info=info)
        write_folder(folder, described, network.state_dict(), getattr(torch, dtype))
        write_readme(folder, described)

    return export
