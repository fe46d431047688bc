"""Write what a run leaves for its user: its model folder, and the page about it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from ldm_dkdm.checkpoints.averaging import KIND
from ldm_dkdm.checkpoints.hashes import ADVICE, verifying
from ldm_dkdm.checkpoints.model_folder import card_of, require_tensors, write_model
from ldm_dkdm.checkpoints.shapes import under
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.errors import UserError
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import decoration, logger
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.resuming import read_checkpoint
from ldm_dkdm.training.run_folder import RunFolder, alone_in, step_of

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


def is_lost(folder: RunFolder, error: UserError) -> bool:
    """Whether a model cannot be read because a file is missing or not what was written, as a message says."""
    files = (folder.model / "config.yaml", folder.model / f"{folder.model.name}.safetensors")
    return not all(file.is_file() for file in files) or ADVICE in str(error)


def export_again(export: Export, folder: RunFolder, checkpoint: Path, max_steps: int, reason: str) -> None:
    """Export the EMA weights of a checkpoint that is known to be whole."""
    with alone_in(folder), verifying(False):
        export(under(read_checkpoint(checkpoint)["state_dict"], "network."), step_of(checkpoint), max_steps)
    lost = reason.replace(ADVICE, "")
    logger.warning(f"{lost}; {folder.model} is written again, with the EMA weights of {checkpoint}")


def on_save(export: Export) -> Callable[[L.Trainer], None]:
    """A function that exports the EMA weights of a trainer."""

    def save(trainer: L.Trainer) -> None:
        network = averaged(trainer, StudentModule).network
        export(network.state_dict(), trainer.global_step, trainer.max_steps)

    return save


def is_reported(folder: Path) -> bool:
    """Whether the page about a run is there, and is not older than its table."""
    page, table = folder / "report.html", folder / "metrics.csv"
    return page.is_file() and (not table.is_file() or page.stat().st_mtime >= table.stat().st_mtime)


def report_on(folder: Path) -> None:
    """Write the page about a run into its folder; a failure is logged."""
    page = folder / "report.html"
    with decoration(str(page)):
        from ldm_dkdm.reports.page import write_report

        logger.info(f"report: {write_report([folder], page)}")
