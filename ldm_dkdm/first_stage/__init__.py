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
}  # by the `target` of a config, ours and those of other code bases

__all__ = ["FIRST_STAGES", "AutoencoderKL", "VQModel"]
