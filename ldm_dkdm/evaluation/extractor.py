"""The interface of feature extractors: uint8 images in, features out."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from ldm_dkdm.errors import UserError

CPU_BATCH = 16  # images in a call on a CPU; larger calls leave its caches
COLOURS = (1, 3)  # channel counts of images that networks of features take: grey, RGB
SHORT = 8  # digits of a hash in a name


@dataclass(frozen=True)
class Features:
    """Features (B,D) of images, and where an extractor has them spatial ones (B,S) and class logits (B,C)."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Forward(Protocol):
    """What a network of FEATURES does."""

    network: nn.Module

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B,3,H,W) -> features."""


@dataclass(frozen=True)
class Extractor:
    """A network with its weights, ready to extract.

    Attributes:
        name: in FEATURES. suffix: after the names of its figures; empty for the FID's own weights.
        forward: the network; None for pixels.
        sha256: hash of the weights' file. resize: how images become its input.
        path: the weights' file, where it is not the pinned one.
        rgb: of pixels, whether grey images are repeated to RGB, as networks take them.
    """

    name: str
    suffix: str
    forward: Forward | None
    sha256: str | None
    resize: str
    device: torch.device
    path: Path | None = None
    rgb: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B,H,W,C) -> features on the CPU; grey images are repeated to RGB.

        Raises:
            UserError: images that are neither grey nor RGB.
        """
        if self.forward is None:
            return Features(self.coloured(images).flatten(1))
        channels = images.shape[-1]
        if channels not in COLOURS:
            raise UserError(f"features: {self.name} takes grey or RGB images, these have {channels} channels")
        parts = [self._of(part) for part in images.split(CPU_BATCH if self.device.type == "cpu" else len(images))]
        return Features(*(None if part[0] is None else torch.cat(part) for part in zip(*parts)))  # type: ignore[arg-type]

    def coloured(self, images: Tensor) -> Tensor:
        """Images (B,H,W,C), of one channel repeated to three with `rgb`."""
        return images.expand(-1, -1, -1, 3) if self.rgb else images

    def repeating_grey(self) -> Self:
        """The same with `rgb`, which its facts say."""
        return replace(self, rgb=True, resize=f"{self.resize}; grey repeated to RGB")

    def _of(self, images: Tensor) -> tuple[Tensor | None, ...]:
        assert self.forward is not None  # `__call__` has returned the pixels
        x = images.movedim(-1, 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        found = self.forward(x.to(self.device))
        return tuple(None if x is None else x.float().cpu() for x in (found.pooled, found.spatial, found.logits))

    @property
    def moments(self) -> bool:
        """Whether mean and covariance are gathered; those of pixels would be too large."""
        return self.forward is not None

    @property
    def opener(self) -> "str | Path | Extractor":
        """What another process opens this extractor by."""
        return self if self.rgb else self.path or self.name

    def titled(self, figure: str) -> str:
        """The name of a figure on these features, such as FD-efficientnet-lite0."""
        return f"{figure}-{self.suffix}" if self.suffix else figure

    def facts(self) -> dict[str, str | None]:
        """Provenance."""
        return {"features": self.name, "weights_sha256": self.sha256, "resize": self.resize}
