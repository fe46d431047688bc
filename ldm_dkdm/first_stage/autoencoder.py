"""The convolutions that CompVis's first stages share, built from taming's parts."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from taming.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor, nn

from ldm_dkdm.first_stage.ddconfig import ATTENTIONS, read_keys, require_whole

CHANNELS = 1024  # most channels of a latent


class Autoencoder(nn.Module):
    """Encoder and decoder of a first stage, with CompVis's parameter names.

    Args:
        ddconfig: keyword arguments of taming's `Encoder` and `Decoder` (ch, ch_mult, z_channels, double_z, ...), and
            CompVis's `attn_type`, `vanilla` or `none`.
        embed_dim: channels of a latent.

    Raises:
        UserError: a key of `ddconfig` that is unknown, missing or out of range, or such an `embed_dim`.
    """

    codes = 0  # size of the codebook, if there is one

    def __init__(self, ddconfig: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        ddconfig = read_keys(ddconfig)
        require_whole("embed_dim", embed_dim, CHANNELS)
        moments = 2 if ddconfig.get("double_z", True) else 1  # mean and log variance, or a latent
        self.in_channels, self.out_channels = ddconfig["in_channels"], ddconfig["out_ch"]
        self.embed_dim = embed_dim
        self.resolution = ddconfig["resolution"]
        self.downsampling = 2 ** (len(ddconfig["ch_mult"]) - 1)
        with contextlib.redirect_stdout(io.StringIO()):  # taming's Decoder prints its latent shape
            self.encoder = Encoder(**ddconfig)
            self.decoder = Decoder(**ddconfig)
        if ATTENTIONS[ddconfig.get("attn_type", "vanilla")] is None:
            _drop_attention(self.encoder, self.decoder)
        self.quant_conv = nn.Conv2d(moments * ddconfig["z_channels"], moments * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B,C,H,W) in [-1,1] -> latents (B,embed_dim,H/f,W/f)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B,embed_dim,h,w) -> images (B,C,h*f,w*f), nominally in [-1,1]."""
        return self.decoder(self.post_quant_conv(z))


def _drop_attention(*halves: Any) -> None:
    """Replace every attention block by the identity."""
    for half in halves:
        half.mid.attn_1 = nn.Identity()
        for level in getattr(half, "down", None) or half.up:
            level.attn = nn.ModuleList(nn.Identity() for _ in level.attn)
