"""Save checkpoints with their pools, and refuse diverged weights."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from ldm_dkdm.checkpoints.hashes import hash_file, write_hash
from ldm_dkdm.config.schema import LoggingConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import make_folder, remove_abandoned, sync, write_torch
from ldm_dkdm.training.ema import gather_average
from ldm_dkdm.training.ends import EarlyStop, StepCallback, figures_of
from ldm_dkdm.training.run_folder import PENDING, RunFolder, checkpoints, step_of
from ldm_dkdm.training.sharding import local

if TYPE_CHECKING:
    from ldm_dkdm.distillation.pool import NoisyPool

KEPT = 2
TEMPORARY = re.compile(r"\..*\.tmp|\.tmp\w{6}")  # the last are those of safetensors
CHECKED_EVERY = 100  # steps between checks of the loss, which wait for the device


class RunCheckpoint(StepCallback):
    """Saves student, EMA, optimizer and step, and each rank's pool beside them; keeps the last two.

    A checkpoint is complete once its `.ckpt` has its name; the pools are written before it. Those at multiples of
    `keep_every` and, with `keep_best`, the one with the best `best_by` stay too, without their pools. What stays when a
    run is resumed with other keys stays for good.

    Args:
        folder: logs/<run>/checkpoints.
        config: steps between saves (a stop and the end save too), and what is kept.
        on_saved: called after each save on rank 0, with the trainer. Once there is a best model, by `best_by` with
            `keep_best`, else by an early stop, it is called when a better one comes instead, so that the model
            folder keeps the best.
    """

    def __init__(self, folder: Path, config: LoggingConfig, on_saved: Callable[[L.Trainer], None]) -> None:
        self.folder, self.config, self.on_saved = folder, config, on_saved
        self.best, self.best_step = math.inf, -1  # smallest `best_by` and its step, with `keep_best`
        self.pool: NoisyPool | None = None  # this rank's, set by a distillation once the rank is known
        self.last_saved = -1
        self.kept_before = set[int]()  # steps of the checkpoints that stay from before a resume
        self.early_stop: EarlyStop | None = None  # set by the run that has one

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step % CHECKED_EVERY == 0:
            refuse_divergence(trainer)
        if trainer.should_stop or step in (trainer.max_steps, self.best_step) or self._due(step):
            self.save(trainer)

    def _due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.config.save_every, self.config.keep_every))

    def measured(self, trainer: L.Trainer, figures: Mapping[str, float]) -> None:
        """Note a better model, with `keep_best`; it must come before this callback's `on_step`, which saves it."""
        figure = figures[self.config.best_by] if self.config.keep_best else math.inf
        if figure < self.best:
            self.best, self.best_step = figure, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        best = {"best": self.best, "best_step": float(self.best_step), "best_by": self.config.best_by}
        return {**best, "keep_every": self.config.keep_every, "kept": sorted(self.kept_before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best; a value of another figure says nothing, and the next measurement is the best so far."""
        if state_dict.get("best_by", "agreement") == self.config.best_by:
            self.best, self.best_step = state_dict["best"], int(state_dict["best_step"])
        found, every = [step_of(checkpoint) for checkpoint in checkpoints(self.folder)], state_dict.get("keep_every")
        best, older = int(state_dict["best_step"]), {*found[:-KEPT]} - {self.best_step}  # versions without "kept"
        self.kept_before = {*state_dict.get("kept", older), *(step for step in found if every and step % every == 0)}
        if not self.config.keep_best or best != self.best_step:
            self.kept_before.add(best)

    def save(self, trainer: L.Trainer) -> None:
        """Write this step's checkpoint unless it is there already."""
        step = trainer.global_step
        if step == self.last_saved:
            return
        refuse_divergence(trainer, trainer.lightning_module.parameters())
        make_folder(self.folder)
        if self.pool is not None:
            self.pool.save(pool_path(self.folder, step, trainer.global_rank), step)
        checkpoint = self.folder / f"step={step:08d}.ckpt"
        pending = self.folder / f".{checkpoint.name}{PENDING}"  # one name for all ranks: rank 0 writes it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it
            if isinstance(callback, StepCallback):
                callback.before_save(trainer)
        trainer.save_checkpoint(pending)
        self.last_saved = step
        gather_average(trainer)
        if trainer.is_global_zero:
            write_hash(checkpoint, pending)
            if step == self.best_step or not self._has_best:
                self.on_saved(trainer)
            pending.replace(checkpoint)
            sync(self.folder)  # the new one is on the disk before an old one goes
            self._forget_old()
        trainer.strategy.barrier()

    @property
    def _has_best(self) -> bool:
        """Whether a best model is in the model folder, which only a better one may replace."""
        if self.config.keep_best:
            return self.best < math.inf
        return self.early_stop is not None and self.early_stop.has_best

    def _forget_old(self) -> None:
        for checkpoint in checkpoints(self.folder)[:-KEPT]:
            step, every = step_of(checkpoint), self.config.keep_every
            stays = step in self.kept_before or bool(every and step % every == 0)
            if not stays and not (self.config.keep_best and step == self.best_step):
                hash_file(checkpoint).unlink(missing_ok=True)
                checkpoint.unlink()
        kept = {checkpoint.stem for checkpoint in checkpoints(self.folder)[-KEPT:]}
        for file in self.folder.glob("*.pool-rank*.safetensors"):
            if file.name.split(".")[0] not in kept:  # pool of a removed checkpoint, a failed one, or the warm-up
                file.unlink()
        for file in self.folder.glob("warmup.walk-rank*.safetensors"):  # left by a process that was killed at its end
            file.unlink()
        sweep(self.folder)


class WrittenInPlace(TorchCheckpointIO):
    """Writes a checkpoint on the disk where it goes, not through memory and /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it atomically.

        Raises:
            OSError: no room, no permission.
        """
        write_torch(Path(path), checkpoint)


def tidy(run: RunFolder) -> None:
    """Remove what killed processes left in a run folder: half-written files, the mapped pools; it must be locked."""
    for folder in (run.path, run.checkpoints, run.model, run.path / "samples"):
        sweep(folder)
    for mapped in run.path.glob("pool-rank*.bin"):  # the checkpoints hold the same
        mapped.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in a run's folder, which must be locked; other processes may write there too."""
    for left in folder.glob(".*"):
        if left.name.endswith(PENDING):  # the process that has the lock alone writes it, and not now
            # without checkpoints it tells a first save that was killed from checkpoints that are gone
            if folder.name != "checkpoints" or checkpoints(folder):
                left.unlink(missing_ok=True)
        elif TEMPORARY.fullmatch(left.name):
            remove_abandoned(left)


def refuse_divergence(trainer: L.Trainer, weights: Iterable[Tensor] = ()) -> None:
    """End a run whose loss is infinite or NaN, or whose weights' norms overflow."""
    loss = figures_of(trainer.lightning_module)["loss"]
    figures = [
        torch.as_tensor(loss, device=getattr(loss, "device", "cpu")),
        *(local(weight.detach()).norm() for weight in weights),
    ]
    bad = not all(map(torch.isfinite, figures))
    if trainer.strategy.reduce_boolean_decision(bad, all=False):  # all processes end together
        step = trainer.global_step
        raise UserError(f"learning_rate: the run diverged by step {step}; the checkpoints are unchanged")


def pool_path(folder: Path, step: int, rank: int) -> Path:
    """The side-car of a checkpoint: one rank's pool."""
    return folder / f"step={step:08d}.pool-rank{rank}.safetensors"


def warmup_path(folder: Path, rank: int) -> Path:
    """The pool of a warm-up, whole or interrupted."""
    return folder / f"warmup.pool-rank{rank}.safetensors"


def walk_path(folder: Path, rank: int) -> Path:
    """Where the batch of chains of an interrupted warm-up is, beside its pool."""
    return folder / f"warmup.walk-rank{rank}.safetensors"
