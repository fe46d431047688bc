"""A picture every few hundred steps: what the student paints from the same noise."""

from pathlib import Path

import lightning as L
import torch

from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.generate import SamplerConfig, sample_images
from ldm_dkdm.images import save_grid
from ldm_dkdm.runs.ema import averaged


class SampleGrid(L.Callback):
    """Writes samples/step=N.png, from the EMA weights.

    Args:
        folder: logs/<run>/samples.
        codec: the first stage.
        shape: (C,H,W) of a state.
        every: steps between grids.
        config: how many, which seeds, how many DDIM steps.
    """

    def __init__(
        self, folder: Path, codec: LatentCodec, shape: tuple[int, int, int], every: int, config: SamplerConfig
    ) -> None:
        self.folder, self.codec, self.shape = folder, codec, shape
        self.every, self.config = every, config

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and step % self.every == 0:
            student = averaged(trainer.callbacks).eval()
            self.codec.to(module.device)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                batches = list(
                    sample_images(
                        student.denoiser, student.schedule, self.shape, self.codec, self.config, module.device
                    )
                )
            save_grid(torch.cat(batches), self.folder / f"step={step:08d}.png")
