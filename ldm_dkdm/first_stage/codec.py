"""Convert states and images: the protocol of all spaces, and the codec of latents."""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ldm_dkdm.device import autocast
from ldm_dkdm.first_stage.autoencoder import Autoencoder
from ldm_dkdm.images import to_signed, to_uint8

MAX_DISTANCES = 1 << 27  # distances of latents and codes computed at once: 0.5 GB in float32
TRUNCATED = "truncated, as ADM"  # how images become 8-bit: guided-diffusion's and CompVis's scripts
CODES = 8192  # size of codebook assumed for batches where there is none


class Codec(Protocol):
    """Converts images to states and back: `LatentCodec`, `pixel.PixelCodec`."""

    scale_factor: float
    rounding: str  # how decoded images become 8-bit

    @property
    def parameters(self) -> int:
        """Number of parameters."""

    @property
    def channels(self) -> int:
        """Channels of a decoded image."""

    @property
    def downsampling(self) -> int:
        """Side of an image over the side of its states."""

    def to(self, device: torch.device | str, precision: str | None = None) -> Self:
        """Compute on this device, `bf16` or `32` where given; returns self."""

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 (B,H,W,C) -> states (B,C,h,w), float32."""

    def decode(self, states: Tensor) -> Tensor:
        """States (B,C,h,w) -> images uint8 (B,H,W,C)."""


class LatentCodec:
    """A frozen first stage: uint8 images to scaled latents and back.

    Args:
        autoencoder: it is put in eval mode and frozen.
        scale_factor: the diffusion model's latents are `scale_factor` times the encoder's.
        precision: `bf16` or `32`.
        target, params: the autoencoder in a config.
        doubt: why the scale may be another one; empty where a file or a user states it.
    """

    rounding = TRUNCATED

    def __init__(
        self,
        autoencoder: Autoencoder,
        scale_factor: float = 1.0,
        precision: str = "32",
        target: str | None = None,
        params: Mapping[str, Any] | None = None,
        doubt: str = "",
    ) -> None:
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scale_factor, self.precision = scale_factor, precision
        self.target, self.params, self.doubt = target, dict(params or {}), doubt

    def to(self, device: torch.device | str, precision: str | None = None) -> Self:
        """Move the autoencoder; returns self."""
        self.autoencoder.to(device)
        self.precision = precision or self.precision
        return self

    @property
    def parameters(self) -> int:
        """Number of the autoencoder's parameters."""
        return sum(p.numel() for p in self.autoencoder.parameters())

    @property
    def channels(self) -> int:
        """Channels of a decoded image."""
        return self.autoencoder.out_channels

    @property
    def downsampling(self) -> int:
        """Side of an image over the side of its latents."""
        return self.autoencoder.downsampling

    @property
    def latent_size(self) -> int:
        """Side of the latents that the autoencoder was made for."""
        return self.autoencoder.resolution // self.autoencoder.downsampling

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.autoencoder.embed_dim

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 (B,H,W,C) -> latents (B,c,h,w), float32."""
        device = next(self.autoencoder.parameters()).device
        x = to_signed(images.to(device))
        with autocast(self.precision, device):
            return self.autoencoder.encode(x).float() * self.scale_factor

    @torch.no_grad()
    def decode(self, states: Tensor) -> Tensor:
        """Latents (B,c,h,w) -> images uint8 (B,H,W,C), a few at a time: every position is compared with every code."""
        distances = states.shape[-2] * states.shape[-1] * (self.autoencoder.codes or CODES)
        parts = states.split(max(1, MAX_DISTANCES // distances))
        return torch.cat([self._decode(part) for part in parts])

    def _decode(self, latents: Tensor) -> Tensor:
        with autocast(self.precision, latents.device):
            return to_uint8(self.autoencoder.decode(latents / self.scale_factor))


def decoders(codec: Codec) -> list[nn.Module]:
    """The network that decodes, which may be compiled; none in pixel space."""
    return [codec.autoencoder.decoder] if isinstance(codec, LatentCodec) else []
