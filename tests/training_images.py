"""Images to train on, and the settings of a training that takes seconds."""

from pathlib import Path

import torch
import torch.nn.functional as F

from ldm_dkdm.npz import save_npz

TRAINER = {"max_steps": 8, "learning_rate": 1e-3, "precision": "32", "accelerator": "cpu", "ema_decay": 0.5}
LOGGING = {"save_every": 4, "sample_every": 3, "sample_count": 2, "sample_steps": 2}


def training_images(folder: Path) -> Path:
    """24 random smooth images, uint8 (24,32,32,3)."""
    coarse = torch.rand(24, 3, 4, 4)
    images = F.interpolate(coarse, size=(32, 32), mode="bilinear").movedim(1, -1)
    save_npz((images * 255).to(torch.uint8), folder / "images.npz")
    return folder / "images.npz"
