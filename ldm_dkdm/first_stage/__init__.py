"""The first stage: images to latents and back."""

from ldm_dkdm.first_stage.kl import AutoencoderKL
from ldm_dkdm.first_stage.vq import VQModel

__all__ = ["AutoencoderKL", "VQModel"]
