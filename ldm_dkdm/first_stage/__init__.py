"""The first stage: images to latents and back."""

from collections.abc import Callable

from torch import nn

from ldm_dkdm.first_stage.kl import AutoencoderKL
from ldm_dkdm.first_stage.vq import VQModel

FIRST_STAGES: dict[str, Callable[..., nn.Module]] = {
    "ldm_dkdm.first_stage.VQModel": VQModel,
    "ldm_dkdm.first_stage.AutoencoderKL": AutoencoderKL,
    "ldm.models.autoencoder.VQModel": VQModel,
    "ldm.models.autoencoder.VQModelInterface": VQModel,
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "taming.models.vqgan.VQModel": VQModel,
}  # `target` of a config, ours or another code base's -> class

__all__ = ["FIRST_STAGES", "AutoencoderKL", "VQModel"]
