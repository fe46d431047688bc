"""Write a run's model folder."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import lightning as L
import torch
from torch import Tensor

from ldm_dkdm.checkpoints.averaging import KIND
from ldm_dkdm.checkpoints.model_folder import card_of, require_tensors, write_model
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.run_folder import RunFolder

Export = Callable[[Mapping[str, Tensor], int, int], None]  # (weights, step, max_steps)


def exporting(model: DiffusionModel, folder: RunFolder, dtype: str) -> Export:
    """A function that writes EMA weights and the model card into the run's model folder.

    Raises:
        UserError: the network's state_dict holds what no weights file can.
    """
    require_tensors(model.network.state_dict(), folder.model_name)
    card = card_of(model, folder.model, f"{folder.model.name}.safetensors")

    def export(weights: Mapping[str, Tensor], step: int, max_steps: int) -> None:
        info = {**card.info, "step": step, "max_steps": max_steps, KIND: "EMA"}
        write_model(folder.model, replace(card, info=info), weights, getattr(torch, dtype))

    return export


def on_save(export: Export) -> Callable[[L.Trainer], None]:
    """A function that exports the EMA weights of a trainer."""

    def save(trainer: L.Trainer) -> None:
        network = averaged(trainer, StudentModule).network
        export(network.state_dict(), trainer.global_step, trainer.max_steps)

    return save
