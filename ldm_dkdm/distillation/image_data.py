"""Images as training data: real ones, a teacher's samples, or both (Alg. 2 and the baselines of Sec. 4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.config.schema import DiffusionDataConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.first_stage.codec import Codec
from ldm_dkdm.images import find_images, read_image, read_npz, square_npz
from ldm_dkdm.reporting import Progress, following

ENCODE_BATCH = 64


@dataclass(frozen=True)
class ImageSet:
    """Images by index; files are read on use.

    Attributes:
        images: uint8 (N,H,W,3), or the paths of N files.
        size: side in pixels.
        labels: (N,) class indices, if any.
    """

    images: Tensor | Sequence[Path]
    size: int
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Tensor:
        """Images uint8 (B,H,W,3)."""
        if isinstance(self.images, Tensor):
            return self.images[indices]
        return torch.stack([read_image(self.images[int(i)], self.size) for i in indices])

    def labels_of(self, indices: Tensor) -> Tensor:
        """Labels (B,) of images in a set that has labels."""
        assert self.labels is not None
        return self.labels[indices]

    def loaded(self, progress: bool | Progress = True) -> "ImageSet":
        """A copy with all images in memory."""
        if isinstance(self.images, Tensor):
            return self
        images = []
        with following(progress, "reading", "image", len(self.images)) as done:
            for file in self.images:
                images.append(read_image(file, self.size))
                done(len(images))
        return ImageSet(torch.stack(images), self.size, self.labels)

    def part(self, fraction: float, seed: int) -> "ImageSet":
        """A random share, at least one image; the same for the same seed."""
        if fraction == 1:
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[: max(1, round(fraction * len(self)))]
        labels = None if self.labels is None else self.labels[chosen]
        if isinstance(self.images, Tensor):
            return ImageSet(self.images[torch.from_numpy(chosen)], self.size, labels)
        return ImageSet([self.images[i] for i in chosen], self.size, labels)


def open_images(path: str | Path, size: int) -> ImageSet:
    """A folder of images (a sub-folder is a class) or an ADM-style .npz (`arr_0`, labels in `arr_1`)."""
    path = expanded(path)
    if path.suffix == ".npz":
        return ImageSet(images := square_npz(path, size), size, _npz_labels(path, len(images)))
    files = find_images(path)
    folders = sorted({file.parent for file in files})
    classes = torch.tensor([folders.index(file.parent) for file in files])
    return ImageSet(files, size, classes if len(folders) > 1 else None)


def _npz_labels(path: Path, count: int) -> Tensor | None:
    labels = read_npz(path, "arr_1")
    if count == 0:
        raise UserError(f"{path}: arr_0 holds no images")
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: arr_1 is {labels.dtype} {labels.shape}, expected {count} integer labels")
    return torch.from_numpy(labels).long()


def open_sets(config: DiffusionDataConfig, seed: int) -> list[ImageSet]:
    """The real images (or a fraction of them) and the synthetic ones that a configuration names."""
    if config.path is None and config.synthetic is None:
        raise UserError("data: names no images; set data.path (real), data.synthetic (a teacher's samples) or both")
    if config.path is None and config.fraction != 1:
        raise UserError("data.fraction: is a share of data.path, which is not set")
    real = [open_images(config.path, config.image_size).part(config.fraction, seed)] if config.path else []
    return real + ([open_images(config.synthetic, config.image_size)] if config.synthetic else [])


class States(Protocol):
    """Clean states to draw from."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """x_0 (count,C,H,W) and labels (count,), with replacement."""


@dataclass(frozen=True)
class CachedStates:
    """States x_0 (N,C,H,W) that were encoded once."""

    x_0: Tensor
    labels: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Uniformly at random."""
        chosen = torch.randint(len(self.x_0), (count,), generator=generator)
        return self.x_0[chosen], None if self.labels is None else self.labels[chosen]


@dataclass(frozen=True)
class EncodedStates:
    """States that are encoded when they are drawn; half of them mirrored if `flip`."""

    sets: Sequence[ImageSet]
    codec: Codec
    flip: bool
    labeled: bool

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Uniformly at random over all sets."""
        ends = torch.tensor([len(images) for images in self.sets]).cumsum(0)
        chosen = torch.randint(int(ends[-1]), (count,), generator=generator)
        owner = torch.searchsorted(ends, chosen, right=True)
        inside = chosen - torch.cat([ends.new_zeros(1), ends])[owner]
        places = [(owner == k).nonzero().flatten() for k in range(len(self.sets))]
        order = torch.cat(places).argsort()
        parts = list(zip(self.sets, places, strict=True))
        drawn = torch.cat([images.take(inside[place]) for images, place in parts if len(place)])[order]
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            drawn = torch.where(mirrored.view(-1, 1, 1, 1), drawn.flip(2), drawn)
        states = self.codec.encode(drawn).cpu()
        if not self.labeled:
            return states, None
        return states, torch.cat([images.labels_of(inside[place]) for images, place in parts])[order]


def encode_sets(
    sets: Sequence[ImageSet], codec: Codec, flip: bool, labeled: bool, progress: bool | Progress = True
) -> CachedStates:
    """Encode every image once, and once mirrored if `flip`."""
    total = sum(map(len, sets)) * (1 + flip)
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    with following(progress, "encoding", "image", total) as done:
        for mirrored in (False, True)[: 1 + flip]:
            for images in sets:
                for indices in torch.arange(len(images)).split(ENCODE_BATCH):
                    batch = images.take(indices)
                    parts.append(codec.encode(batch.flip(2) if mirrored else batch).cpu())
                    labels += [images.labels_of(indices)] if labeled else []
                    done(sum(map(len, parts)))
    return CachedStates(torch.cat(parts), torch.cat(labels) if labeled else None)
