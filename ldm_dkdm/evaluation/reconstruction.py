"""How well a first stage reconstructs images: PSNR, SSIM, LPIPS, use of the codebook."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.likeness import likeness
from ldm_dkdm.evaluation.perceptual import Lpips
from ldm_dkdm.evaluation.samples import weights_of
from ldm_dkdm.evaluation.sources import ImageSource
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.first_stage.vq import VQModel
from ldm_dkdm.reporting import Progress, following

LARGEST = 1e6  # magnitude of a latent


@dataclass(frozen=True)
class Reconstructions:
    """Images of a set after a first stage has encoded and decoded them, in 8 bits."""

    codec: LatentCodec
    images: ImageSource
    name: str

    @property
    def count(self) -> int:
        """Number of images."""
        return self.images.count

    def identity(self) -> dict[str, Any]:
        """The first stage's weights and the images."""
        return {"first_stage": weights_of(self.codec.autoencoder), **self.images.identity()}

    def facts(self) -> dict[str, Any]:
        """Provenance."""
        own = {"source": self.name, "kind": "reconstructions", "sha256": weights_of(self.codec.autoencoder)}
        return {**self.images.facts(), **own, "rounding": self.codec.rounding}

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Reconstructions from number `first` on."""
        for images in self.images.batches(first, batch_size):
            yield self.codec.decode(encoded(self.codec, images)).cpu()

    def stored(self) -> None:
        """None: there are no statistics."""


def reconstruction(
    codec: LatentCodec,
    images: ImageSource,
    batch_size: int = 16,
    progress: bool | Progress = False,
    lpips: Lpips | None = None,
) -> dict[str, float]:
    """Figures of a first stage on a set of images, each the mean over images.

    PSNR, SSIM and LPIPS (`likeness`) of 8-bit images; of a VQ first stage the share of codes in use and their
    perplexity.

    Raises:
        UserError: images whose channels or size the first stage does not take.
    """
    sums: dict[str, float] = {}
    codes = torch.zeros(codec.autoencoder.codes or 0, dtype=torch.float64, device="cpu")
    done = 0
    with following(progress, "reconstructing", "image", images.count) as show:
        for batch in images.batches(0, batch_size):
            latents = encoded(codec, batch)
            figures = likeness(batch, codec.decode(latents), None if lpips is None else lpips.metric)
            for name, values in figures.items():
                sums[name.upper()] = sums.get(name.upper(), 0.0) + values.sum().item()
            codes += _codes(codec, latents)
            done += len(batch)
            show(done)
    return {name: value / done for name, value in sums.items()} | _usage(codes)


def require_encodable(codec: LatentCodec, shape: tuple[int, int, int]) -> None:
    """Refuse images (H,W,C) of a shape that a first stage does not take.

    Raises:
        UserError: both shapes.
    """
    height, width, channels = shape
    own, factor = codec.autoencoder.in_channels, codec.downsampling
    if channels != own or height % factor or width % factor:
        raise UserError(
            f"samples: the first stage takes {own} channels and sides that are multiples of {factor}, the images are "
            f"{height}x{width}x{channels}"
        )


def encoded(codec: LatentCodec, images: Tensor) -> Tensor:
    """Latents (B,c,h,w) of images uint8 (B,H,W,C) that a first stage takes.

    Raises:
        UserError: images whose channels or size it does not take, or latents that are not numbers.
    """
    height, width, channels = images.shape[1:]
    require_encodable(codec, (height, width, channels))
    latents = codec.encode(images)
    if not latents.abs().max() <= LARGEST:  # also refuses NaN
        raise UserError(f"samples: the first stage's latents are not finite, or beyond {LARGEST:g}")
    return latents


def _codes(codec: LatentCodec, latents: Tensor) -> Tensor:
    """How often each code is the nearest of latents (B,c,h,w)."""
    if not isinstance(codec.autoencoder, VQModel):
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    indices = codec.autoencoder.quantise(latents / codec.scale_factor)[2]
    return torch.bincount(indices.flatten().cpu(), minlength=codec.autoencoder.codes).double()


def _usage(codes: Tensor) -> dict[str, float]:
    """Share of codes in use, and exp of the entropy of their frequencies."""
    if not len(codes):
        return {}
    p = codes / codes.sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return {"codes in use": (codes > 0).double().mean().item(), "code perplexity": entropy.exp().item()}
