"""Save checkpoints with their pools, and refuse diverged weights."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.training.ends import EarlyStop, StepCallback
from ldm_dkdm.training.run_folder import checkpoints

if TYPE_CHECKING:
    from ldm_dkdm.distillation.pool import NoisyPool

KEPT = 2
CHECKED_EVERY = 100  # steps between checks of the loss, which wait for the device


class RunCheckpoint(StepCallback):
    """Saves student, EMA, optimizer and step, and each rank's pool beside them; keeps the last two.

    A checkpoint is complete once its `.ckpt` has its name; the pools are written before it.

    Args:
        folder: logs/<run>/checkpoints.
        every: steps between saves; a stop and the end save too.
        on_saved: called after each save on rank 0, with the trainer. Once an early stop has found a best model, it
            is called when a better one comes instead, so that the model folder keeps the best.
    """

    def __init__(self, folder: Path, every: int, on_saved: Callable[[L.Trainer], None]) -> None:
        self.folder, self.every, self.on_saved = folder, every, on_saved
        self.pool: NoisyPool | None = None  # this rank's, set by a distillation once the rank is known
        self.last_saved = -1
        self.early_stop: EarlyStop | None = None  # set by the run that has one

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step % CHECKED_EVERY == 0:
            refuse_divergence(trainer)
        if step % self.every == 0 or step >= trainer.max_steps or trainer.should_stop:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write this step's checkpoint unless it is there already."""
        step = trainer.global_step
        if step == self.last_saved:
            return
        refuse_divergence(trainer, trainer.lightning_module.parameters())
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.pool is not None:
            self.pool.save(pool_path(self.folder, step, trainer.global_rank), step)
        temporary = self.folder / f".step={step:08d}.ckpt.tmp"  # one name for all ranks: rank 0 writes it
        trainer.save_checkpoint(temporary)
        self.last_saved = step
        if trainer.is_global_zero:
            if self.early_stop is None or not self.early_stop.has_best:
                self.on_saved(trainer)
            temporary.replace(self.folder / f"step={step:08d}.ckpt")
            self._forget_old()
        trainer.strategy.barrier()

    def _forget_old(self) -> None:
        for checkpoint in checkpoints(self.folder)[:-KEPT]:
            checkpoint.unlink()
        kept = {checkpoint.stem for checkpoint in checkpoints(self.folder)}
        for file in self.folder.glob("*.pool-rank*.safetensors"):
            if file.name.split(".")[0] not in kept:  # pool of a removed checkpoint, a failed one, or the warm-up
                file.unlink()
        for file in self.folder.glob(".*.tmp"):
            file.unlink()


def refuse_divergence(trainer: L.Trainer, weights: Iterable[Tensor] = ()) -> None:
    """End a run whose loss is no longer finite, or whose weights' norms overflow."""
    figures = [trainer.callback_metrics["loss"], *(weight.detach().norm() for weight in weights)]
    bad = not all(map(torch.isfinite, figures))
    if trainer.strategy.reduce_boolean_decision(bad, all=False):  # all processes end together
        step = trainer.global_step
        raise UserError(f"learning_rate: the run diverged by step {step}; the checkpoints are unchanged")


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint, mapped into memory; no code in it is run.

    Raises:
        UserError: the file is damaged.
    """
    fault = "is damaged; delete it to continue from the checkpoint before"
    try:
        with blaming(checkpoint, fault):
            return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:  # too short to be mapped
        raise UserError(f"{checkpoint}: {fault} ({error})") from error


def pool_path(folder: Path, step: int, rank: int) -> Path:
    """The side-car of a checkpoint: one rank's pool."""
    return folder / f"step={step:08d}.pool-rank{rank}.safetensors"


def warmup_path(folder: Path, rank: int) -> Path:
    """The pool of a warm-up, whole or interrupted."""
    return folder / f"warmup.pool-rank{rank}.safetensors"
