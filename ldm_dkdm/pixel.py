"""Pixel space: the table SPACES holds all differences from latent space (conventions of Improved DDPM)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.images import to_signed, to_uint8


class PixelCodec:
    """The first stage of pixel space: uint8 images to states in [-1,1] and back.

    Args:
        channels: of an image and of its states.
    """

    parameters = 0
    downsampling = 1
    scale_factor = 1.0
    rounding = "to nearest"

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str, precision: str | None = None) -> "PixelCodec":
        """Encode to this device, always in float32; returns self."""
        self.device = device
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 (B,H,W,C) -> states (B,C,H,W) in [-1,1], float32."""
        return to_signed(images.to(self.device))

    def decode(self, states: Tensor) -> Tensor:
        """States (B,C,H,W) -> the nearest images uint8 (B,H,W,C), so that encoded images come back unchanged."""
        return to_uint8(states, nearest=True)


@dataclass(frozen=True)
class Space:
    """The properties of a model's states.

    Attributes:
        encoded: a first stage encodes images to states; else the states are the images.
        clip: by default x_0 is clipped to [-clip, clip]; None leaves it as it is.
        steps_offset: DDIM's, see `NoiseSchedule`.
        likelihood: data can teach a variance, since states are 8-bit values whose likelihood is known.
    """

    encoded: bool
    clip: float | None
    steps_offset: int
    likelihood: bool


SPACES = {  # value of `diffusion.space` -> properties
    "latent": Space(encoded=True, clip=None, steps_offset=1, likelihood=False),
    "pixel": Space(encoded=False, clip=1.0, steps_offset=0, likelihood=True),
}
