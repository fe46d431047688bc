"""Pixel space: all that differs from latent space (conventions of Improved DDPM)."""

import torch
from torch import Tensor

from ldm_dkdm.denoiser import Denoiser
from ldm_dkdm.records import Prediction


class PixelDenoiser(Denoiser):
    """A pixel-space network: x_0 is clipped to [-1,1], and the output may carry a variance.

    With twice the channels of x, the output's second half is `Prediction.var_fraction` (learned-range
    variance, Improved DDPM, Eq. 15). eps is what the network says, unclipped: it is the student's target.
    """

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Split what the network says, and clip x_0."""
        channels = x.shape[1]
        prediction = super().read(output[:, :channels], x, t)
        fraction = output[:, channels:] if output.shape[1] > channels else None
        return Prediction(prediction.eps, prediction.x_0.clamp(-1, 1), fraction)


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
