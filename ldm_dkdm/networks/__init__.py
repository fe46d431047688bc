"""The networks that can be teacher or student: callables (x, t, label=None) -> tensor."""

from ldm_dkdm.networks.dit import DiT
from ldm_dkdm.networks.unet import UNet

__all__ = ["DiT", "UNet"]
