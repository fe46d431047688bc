"""The first stage: images to latents and back."""

from ldm_dkdm.first_stage.vq import VQModel

__all__ = ["VQModel"]
