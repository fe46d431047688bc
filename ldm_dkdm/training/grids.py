"""A grid of samples every few steps, always from the same noise."""

from pathlib import Path

import lightning as L
import numpy as np
import torch

from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import LoggingConfig, SamplingConfig
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.images import grid, save_image
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import decoration
from ldm_dkdm.training.ema import averaged, gather_average
from ldm_dkdm.training.ends import StepCallback
from ldm_dkdm.training.loggers import show_image


class SampleGrid(StepCallback):
    """Writes samples/step=N.png, from the EMA weights of a `StudentModule`; a failure is logged.

    Args:
        folder: logs/<run>/samples.
        log: steps between grids, samples per grid, DDIM steps.
        seed: seed of the samples.
        teacher: with the first grid of a training, its samples from the same noise are written to teacher.png.
    """

    def __init__(self, folder: Path, log: LoggingConfig, seed: int, teacher: DiffusionModel | None = None) -> None:
        self.folder, self.every = folder, log.sample_every
        self.settings, self.seed, self.teacher = log, seed, teacher

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the grid of the checkpoint that the training continues from, if a kill came between the two."""
        super().on_train_start(trainer, module)
        step = trainer.global_step
        if step and step % self.every == 0 and trainer.strategy.broadcast(not self._file(step).exists()):
            self.on_step(trainer, module)

    def _file(self, step: int) -> Path:
        return self.folder / f"step={step:08d}.png"

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step % self.every:
            return
        gather_average(trainer)
        if not trainer.is_global_zero:
            return
        self._write(averaged(trainer, StudentModule, called=True).model, self._file(step), "samples", trainer)
        if self.teacher is not None:
            self._write(self.teacher, self.folder / "teacher.png", "teacher", trainer)
            self.teacher = None

    def _write(self, model: DiffusionModel, path: Path, name: str, trainer: L.Trainer) -> None:
        """Sample a grid, write it to a file, and give it to the loggers under a name."""
        with decoration(str(path)):
            steps = steps_within(self.settings, "sample_steps", model.schedule.num_timesteps)
            config = SamplingConfig(self.settings.sample_count, seed=self.seed, steps=steps)
            sheet = grid(torch.cat([batch.images for batch in model.sample_batches(config)]))
            save_image(sheet, path)
            show_image(trainer.loggers, name, np.asarray(sheet), trainer.global_step)
