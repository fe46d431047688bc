"""Write a run's model folder."""

from collections.abc import Callable
from dataclasses import replace

import lightning as L
import torch

from ldm_dkdm.checkpoints.averaging import KIND
from ldm_dkdm.checkpoints.model_folder import card_of, require_tensors, write_model
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.run_folder import RunFolder


def export_on_save(model: DiffusionModel, folder: RunFolder, dtype: str) -> Callable[[L.Trainer], None]:
    """A function that writes the EMA weights of a trainer and the model card into the run's model folder.

    Raises:
        UserError: the network's state_dict holds what no weights file can.
    """
    require_tensors(model.network.state_dict(), folder.model_name)
    card = card_of(model, folder.model, f"{folder.model.name}.safetensors")

    def export(trainer: L.Trainer) -> None:
        steps = {"step": trainer.global_step, "max_steps": trainer.max_steps}
        info = {**card.info, **steps, KIND: "EMA"}
        network = averaged(trainer, StudentModule).network
        write_model(folder.model, replace(card, info=info), network.state_dict(), getattr(torch, dtype))

    return export
