"""Images as training data: real ones, a teacher's samples, or both (Alg. 2 and the baselines of Sec. 4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.config.schema import DiffusionDataConfig
from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.files import expanded
from ldm_dkdm.first_stage.codec import Codec
from ldm_dkdm.images import find_images, folder_of_images, read_image, read_images
from ldm_dkdm.npz import is_npz, read_npz, square_npz
from ldm_dkdm.reporting import Progress, following, logger

ENCODE_BATCH = 64
LABELS = 1_000_000  # every label is smaller


@dataclass(frozen=True)
class ImageSet:
    """Images by index; files are read on use.

    Attributes:
        images: uint8 (N,H,W,C), or the paths of N files.
        size: side in pixels.
        labels: (N,) class indices, if any.
        channels: C, 1 (grey) or 3 for files.
        classes: what the labels mean, such as `0 cat` or `7`, where folders name them.
        loose: a file in no class folder although others are in one; then there are no labels.
        unclear: why the numbers that name the folders give no labels, such as train/1 and val/1; empty if they do.
    """

    images: Tensor | Sequence[Path]
    size: int
    labels: Tensor | None = None
    channels: int = 3
    classes: Sequence[str] = ()
    loose: Path | None = None
    unclear: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Tensor:
        """Images uint8 (B,H,W,C)."""
        if isinstance(self.images, Tensor):
            return self.images[indices]
        return torch.stack([read_image(self.images[int(i)], self.size, self.channels) for i in indices])

    def labels_of(self, indices: Tensor) -> Tensor:
        """Labels (B,) of images in a set that has labels."""
        assert self.labels is not None
        return self.labels[indices]

    def loaded(self, progress: bool | Progress = True) -> "ImageSet":
        """A copy with all images in memory."""
        if isinstance(self.images, Tensor):
            return self
        return replace(self, images=read_images(self.images, self.size, self.channels, progress))

    def part(self, fraction: float, seed: int) -> "ImageSet":
        """A random share, at least one image; the same for the same seed."""
        return self if fraction == 1 else self.some(max(1, round(fraction * len(self))), seed)

    def some(self, count: int, seed: int) -> "ImageSet":
        """A random choice of `count` images; the same for the same seed."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        labels = None if self.labels is None else self.labels[chosen]
        if isinstance(self.images, Tensor):
            return replace(self, images=self.images[torch.from_numpy(chosen)], labels=labels)
        return replace(self, images=[self.images[i] for i in chosen], labels=labels)


def open_images(path: str | Path, size: int, channels: int = 3) -> ImageSet:
    """A folder of images (a sub-folder is a class) or an ADM-style .npz (`arr_0`, labels in `arr_1`).

    Sub-folders named by whole numbers, at the same level for all images, are the classes of these numbers; other names
    are numbered in their order. There are no labels where a number names two folders, which may be one class or two.
    """
    path = folder_of_images(expanded(path))
    if is_npz(path):
        return ImageSet(images := square_npz(path, size, channels), size, _npz_labels(path, len(images)), channels)
    files = find_images(path, channels)
    folders = sorted({file.parent for file in files})
    _name_empty(path, folders)
    if path in folders:
        loose = next(file for file in files if file.parent == path) if len(folders) > 1 else None
        return ImageSet(files, size, None, channels, loose=loose)
    numbers = _class_numbers(path, folders)
    if unclear := _unclear(folders, numbers):
        return ImageSet(files, size, None, channels, unclear=unclear)
    classes = dict(zip(folders, numbers[0], strict=True))
    named = sorted((number, str(folder.relative_to(path))) for folder, number in classes.items())
    labels = torch.tensor([classes[file.parent] for file in files], device="cpu")
    return ImageSet(
        files, size, labels, channels, [name if name == str(number) else f"{number} {name}" for number, name in named]
    )


def _name_empty(path: Path, folders: Sequence[Path]) -> None:
    """Warn of sub-folders without images, which are no classes."""
    used = {above for folder in folders for above in (folder, *folder.parents)}
    empty = [f.name for f in sorted(path.iterdir()) if f.is_dir() and f not in used and not f.name.startswith(".")]
    if empty:
        logger.warning(f"{path}: {len(empty)} sub-folders hold no images: {', '.join(empty[:8])}")


def _class_numbers(path: Path, folders: Sequence[Path]) -> list[tuple[int, ...]]:
    """Numbers of the folders: those of each level below `path` at which all are named by one, else their places.

    Levels count from the top and from the images. One that has the same number everywhere tells no classes apart: it
    counts only where no other level has numbers.
    """
    names = [folder.relative_to(path).parts for folder in folders]
    depth = min(map(len, names))
    levels = [[parts[level] for parts in names] for level in (*range(depth), *range(-depth, 0))]
    numbers = [tuple(map(int, level)) for level in levels if all(name.isdecimal() for name in level)]
    found = list(dict.fromkeys(numbers))
    return [level for level in found if len(set(level)) > 1] or found[:1] or [tuple(range(len(folders)))]


def _unclear(folders: Sequence[Path], numbers: Sequence[tuple[int, ...]]) -> str:
    """Why the numbers of `_class_numbers` are no labels; empty if they are."""
    owners: dict[int, Path] = {}
    for folder, number, *others in zip(folders, *numbers, strict=True):
        if differing := [other for other in others if other != number]:
            return f"{folder} may be class {number} or {differing[0]}; rename the folders of the other level"
        if number >= LABELS:
            return f"{folder} is named by a number too large for a class; name it by its class, from 0 on, or by a word"
        if owners.setdefault(number, folder) != folder:
            return (
                f"{owners[number]} and {folder} are both class {number}; move the images of one class into one folder, "
                "rename one of two classes"
            )
    return ""


def _npz_labels(path: Path, count: int) -> Tensor | None:
    labels = read_npz(path, "arr_1")
    if count == 0:
        raise UserError(f"{path}: arr_0 holds no images")
    if labels is None:
        return None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{path}: arr_1 is {labels.dtype} {labels.shape}, expected {count} integer labels")
    if labels.min() < 0 or labels.max() >= LABELS:
        raise UserError(f"{path}: arr_1 holds labels {labels.min()} ... {labels.max()}, which are no classes")
    return torch.from_numpy(labels.astype(np.int64))


def open_sets(config: DiffusionDataConfig, seed: int, channels: int = 3) -> dict[str, ImageSet]:
    """The real images (`path`) and the synthetic ones (`synthetic`) that a configuration uses, of `channels`.

    Where there are both: with `mix: replace`, `fraction` of the synthetic images, at least one, give way to as many
    real ones (data-limited training of the public code); else `fraction` of the real images are added.

    Raises:
        UserError: no images, or a share of images that are not there.
    """
    if config.path is None and config.synthetic is None:
        raise UserError("data: names no images; set data.path (real), data.synthetic (a teacher's samples) or both")
    if config.path is None and config.fraction != 1:
        raise UserError("data.fraction: is a share of data.path, which is not set")
    size = config.image_size
    with naming("data.path"):
        real = open_images(config.path, size, channels) if config.path else None
    with naming("data.synthetic"):
        synthetic = open_images(config.synthetic, size, channels) if config.synthetic else None
    if config.mix == "replace" and real is not None and synthetic is not None:
        count = max(1, round(config.fraction * len(synthetic)))
        if count > len(real):
            raise UserError(f"data.path: holds {len(real)} images, {count} are to replace samples; lower data.fraction")
        real, synthetic = real.some(count, seed), synthetic.some(len(synthetic) - count, seed)
    elif real is not None:
        real = real.part(config.fraction, seed)
    return {key: images for key, images in {"path": real, "synthetic": synthetic}.items() if images}


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
        chosen = torch.randint(len(self.x_0), (count,), generator=generator, device=generator.device)
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
        ends = torch.tensor([len(images) for images in self.sets], device="cpu").cumsum(0)
        chosen = torch.randint(int(ends[-1]), (count,), generator=generator, device=generator.device)
        owner = torch.searchsorted(ends, chosen, right=True)
        inside = chosen - torch.cat([ends.new_zeros(1), ends])[owner]
        places = [(owner == k).nonzero().flatten() for k in range(len(self.sets))]
        order = torch.cat(places).argsort()
        parts = list(zip(self.sets, places, strict=True))
        drawn = torch.cat([images.take(inside[place]) for images, place in parts if len(place)])[order]
        if self.flip:
            mirrored = torch.rand(count, generator=generator, dtype=torch.float32, device=generator.device) < 0.5
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
                for indices in torch.arange(len(images), device="cpu").split(ENCODE_BATCH):
                    batch = images.take(indices)
                    parts.append(codec.encode(batch.flip(2) if mirrored else batch).cpu())
                    labels += [images.labels_of(indices)] if labeled else []
                    done(sum(map(len, parts)))
    return CachedStates(torch.cat(parts), torch.cat(labels) if labeled else None)
