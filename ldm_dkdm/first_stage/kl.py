"""KL-regularised autoencoder with CompVis's parameter names."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.autoencoder import Autoencoder


class AutoencoderKL(Autoencoder):
    """CompVis's `AutoencoderKL` (Rombach et al. 2022), also Stable Diffusion's VAE.

    Args:
        ddconfig: keyword arguments of taming's `Encoder` and `Decoder`, `double_z: true` among them.
        embed_dim: channels of a latent.
    """

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        if not ddconfig.get("double_z", True):
            raise UserError("ddconfig: a KL first stage has double_z: true")
        super().__init__(ddconfig, embed_dim)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B,C,H,W) in [-1,1] -> the MEAN of their latents' distribution (B,embed_dim,H/f,W/f)."""
        return super().encode(x).chunk(2, dim=1)[0]
