"""VQ-regularised autoencoder with CompVis's parameter names."""

from collections.abc import Mapping
from typing import Any

import torch
from taming.modules.vqvae.quantize import VectorQuantizer2
from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.autoencoder import Autoencoder
from ldm_dkdm.first_stage.ddconfig import require_whole

CODES = 1 << 20  # most codes


class VQModel(Autoencoder):
    """VQGAN autoencoder (Esser et al. 2021) behind CompVis's `VQModelInterface`.

    Args:
        ddconfig: keyword arguments of taming's `Encoder` and `Decoder` (ch, ch_mult, z_channels, ...).
        n_embed: number of codes.
        embed_dim: channels of a latent.
    """

    def __init__(self, ddconfig: Mapping[str, Any], n_embed: int, embed_dim: int) -> None:
        if ddconfig.get("double_z", True):
            raise UserError("ddconfig: a VQ first stage has double_z: false")
        require_whole("n_embed", n_embed, CODES)
        super().__init__(ddconfig, embed_dim)
        self.codes = n_embed
        self.quantize = VectorQuantizer2(n_embed, embed_dim, beta=0.25)

    def decode(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (B,embed_dim,h,w) BEFORE quantisation -> images (B,C,h*f,w*f), nominally in [-1,1].

        The latents are replaced by their nearest codes first, unless `force_not_quantize`.
        """
        quantized = z if force_not_quantize else self.quantise(z)[0]
        return super().decode(quantized.to(z.dtype))

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest codes of z (straight-through), the codebook loss, and the code indices (B*h*w,).

        Distances are taken in float32: bf16 cannot distinguish thousands of codes.
        """
        with torch.autocast(z.device.type, enabled=False):
            quantized, loss, (_, _, indices) = self.quantize(z.float())
        return quantized, loss, indices
