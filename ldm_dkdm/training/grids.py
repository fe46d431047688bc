"""A picture every few hundred steps: what the student paints from the same noise."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

from ldm_dkdm.assemble import Codec
from ldm_dkdm.generate import SamplerConfig, sample_images
from ldm_dkdm.images import save_grid
from ldm_dkdm.training.ema import averaged
from ldm_dkdm.training.ends import StepCallback


class SampleGrid(StepCallback):
    """Writes samples/step=N.png, from the EMA weights.

    Args:
        folder: logs/<run>/samples.
        codec: the first stage.
        shape: (C,H,W) of a state.
        every: steps between grids.
        config: how many, which seeds, how many DDIM steps.
        classes: the labels of a class-conditional model.
    """

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        shape: tuple[int, int, int],
        every: int,
        config: SamplerConfig,
        classes: Sequence[int] | None = None,
    ) -> None:
        self.folder, self.codec, self.shape = folder, codec, shape
        self.every, self.config, self.classes = every, config, classes

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and step % self.every == 0:
            student = averaged(trainer.callbacks).eval()
            self.codec.to(module.device)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                batches = list(
                    sample_images(
                        student.denoiser,
                        student.schedule,
                        self.shape,
                        self.codec,
                        self.config,
                        module.device,
                        self.classes,
                    )
                )
            save_grid(torch.cat(batches), self.folder / f"step={step:08d}.png")
