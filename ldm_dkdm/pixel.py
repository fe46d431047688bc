"""Pixel space: all that differs from latent space (conventions of Improved DDPM)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm_dkdm.denoiser import Denoiser
from ldm_dkdm.records import Prediction


class PixelDenoiser(Denoiser):
    """A pixel-space network: x_0 is clipped to [-1,1].

    eps is what the network says, unclipped: it is the student's target.
    """

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """What the network says, with x_0 clipped."""
        prediction = super().read(output, x, t)
        return replace(prediction, x_0=prediction.x_0.clamp(-1, 1))


class IdentityCodec:
    """The first stage of pixel space: uint8 images to [-1,1] and back."""

    parameters = 0
    scale_factor = 1.0

    def __init__(self) -> None:
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> "IdentityCodec":
        """Encode to this device; returns self."""
        self.device = device
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 (B,H,W,3) -> states (B,3,H,W) in [-1,1], float32."""
        return images.to(self.device).movedim(-1, 1).contiguous().float() / 127.5 - 1

    def decode(self, states: Tensor) -> Tensor:
        """States (B,3,H,W) -> the nearest images uint8 (B,H,W,3); ADM rounds down."""
        return ((states.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)


@dataclass(frozen=True)
class Space:
    """What a model's states are, as far as it makes a difference.

    Attributes:
        encoded: a first stage makes them out of images.
        denoiser: how a network's output is read.
        steps_offset: DDIM's, see `NoiseSchedule`.
    """

    encoded: bool
    denoiser: type[Denoiser]
    steps_offset: int


SPACES = {"latent": Space(True, Denoiser, 1), "pixel": Space(False, PixelDenoiser, 0)}  # by `diffusion.space`
