"""A grid of samples every few steps, always from the same noise."""

from pathlib import Path

import lightning as L
import torch

from ldm_dkdm.config.checked import steps_within
from ldm_dkdm.config.schema import LoggingConfig, SamplingConfig
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.images import save_grid
from ldm_dkdm.reporting import decoration
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.ends import StepCallback


class SampleGrid(StepCallback):
    """Writes samples/step=N.png, from the EMA weights of a `StudentModule`; a failure is logged.

    Args:
        folder: logs/<run>/samples.
        log: steps between grids, samples per grid, DDIM steps.
        seed: seed of the samples.
    """

    def __init__(self, folder: Path, log: LoggingConfig, seed: int) -> None:
        self.folder, self.every = folder, log.sample_every
        self.settings, self.seed = log, seed

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and step % self.every == 0:
            file = self.folder / f"step={step:08d}.png"
            with decoration(str(file)):
                model = averaged(trainer, StudentModule).model
                steps = steps_within(self.settings, "sample_steps", model.schedule.num_timesteps)
                config = SamplingConfig(self.settings.sample_count, seed=self.seed, steps=steps)
                save_grid(torch.cat([batch.images for batch in model.sample_batches(config)]), file)
