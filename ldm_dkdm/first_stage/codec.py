"""Between latents and pictures."""

import torch
from torch import Tensor

from ldm_dkdm.device import autocast
from ldm_dkdm.first_stage.autoencoder import Autoencoder

MAX_DISTANCES = 1 << 27  # between latents and codes at once: 0.5 GB in float32
CODES = 8192  # where there is no codebook, batches are as large as with this one


class LatentCodec:
    """A frozen first stage: uint8 images to scaled latents and back.

    Args:
        vq: the autoencoder; it is put in eval mode and frozen.
        scale_factor: the diffusion model's latents are `scale_factor` times the encoder's.
        precision: `bf16` or `32`.
    """

    def __init__(self, vq: Autoencoder, scale_factor: float = 1.0, precision: str = "32") -> None:
        self.vq = vq.eval().requires_grad_(False)
        self.scale_factor, self.precision = scale_factor, precision

    def to(self, device: torch.device | str) -> "LatentCodec":
        """Move the autoencoder; returns self."""
        self.vq.to(device)
        return self

    @property
    def parameters(self) -> int:
        """Number of the autoencoder's parameters."""
        return sum(p.numel() for p in self.vq.parameters())

    @property
    def latent_size(self) -> int:
        """Side of the latents that the autoencoder was made for."""
        return self.vq.resolution // self.vq.downsampling

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.vq.embed_dim

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 (B,H,W,3) -> latents (B,C,h,w), float32."""
        device = next(self.vq.parameters()).device
        x = images.to(device).movedim(-1, 1).contiguous().float() / 127.5 - 1  # channels_last is slow on a CPU
        with autocast(self.precision, device):
            return self.vq.encode(x).float() * self.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B,C,h,w) -> images uint8 (B,H,W,3), a few at a time: every position meets every code."""
        distances = latents.shape[-2] * latents.shape[-1] * (self.vq.codes or CODES)
        parts = latents.split(max(1, MAX_DISTANCES // distances))
        return torch.cat([self._decode(part) for part in parts])

    def _decode(self, latents: Tensor) -> Tensor:
        with autocast(self.precision, latents.device):
            x = self.vq.decode(latents / self.scale_factor)
        return ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).movedim(1, -1)
