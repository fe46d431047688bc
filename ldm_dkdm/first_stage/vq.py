"""VQ-regularised autoencoder with CompVis's parameter names, out of taming's parts."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor, nn


class VQModel(nn.Module):
    """VQGAN autoencoder (Esser et al. 2021) behind CompVis's `VQModelInterface`.

    Args:
        ddconfig: keyword arguments of taming's `Encoder` and `Decoder` (ch, ch_mult, z_channels, ...).
        n_embed: number of codes.
        embed_dim: channels of a latent.
    """

    def __init__(self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.in_channels = ddconfig["in_channels"]
        self.embed_dim = embed_dim
        self.resolution = ddconfig["resolution"]
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)
        with contextlib.redirect_stdout(io.StringIO()):  # taming's Decoder prints its latent shape
            self.encoder = Encoder(**ddconfig)
            self.decoder = Decoder(**ddconfig)
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=0.25)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B,C,H,W) in [-1,1] -> latents (B,embed_dim,H/f,W/f) BEFORE quantisation."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (B,embed_dim,h,w) -> images (B,C,h*f,w*f), nominally in [-1,1].

        The latents are replaced by their nearest codes first, unless `force_not_quantize`.
        """
        quantized = z if force_not_quantize else self.quantise(z)[0]
        return self.decoder(self.post_quant_conv(quantized.to(z.dtype)))

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest codes of z (straight-through), the codebook loss, and the code indices (B*h*w,).

        Distances are taken in float32: bf16 cannot tell thousands of codes apart.
        """
        with torch.autocast(z.device.type, enabled=False):
            quantized, loss, (_, _, indices) = self.quantize(z.float())
        return quantized, loss, indices
