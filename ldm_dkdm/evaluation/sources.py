"""Sets of images to measure: models that are sampled, folders, .npz files, tensors; all in batches, none kept."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.comparability import size_fact
from ldm_dkdm.evaluation.npz import NpzFile
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.files import require_file
from ldm_dkdm.images import find_images, folder_of_images, opened_image, read_image
from ldm_dkdm.npz import is_npz

JPEG = b"\xff\xd8\xff"  # what such a file begins with
GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")  # Pillow's modes of grey files
INHERITED = ("size", "rounding", "resized", "lossy")  # facts of a set that those of its statistics keep


class ImageSource(Protocol):
    """A set of images in a fixed order."""

    @property
    def name(self) -> str:
        """The set as the user named it."""

    @property
    def count(self) -> int:
        """Number of images; 0 where there are statistics only."""

    def identity(self) -> dict[str, Any]:
        """What decides the images, such as hashes and seeds: the key of the cache."""

    def facts(self) -> dict[str, Any]:
        """Provenance for the result."""

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Images uint8 (B,H,W,C) from number `first` on."""

    def stored(self) -> Statistics | None:
        """Statistics that the file holds instead of images, or beside them."""


@dataclass(frozen=True)
class FolderImages:
    """The image files below a folder, sorted by path; grey (B,H,W,1) where all of them are, otherwise RGB.

    Args:
        size: side to which images are cropped and resized by `read_image`; default: their own, equal squares.
    """

    path: Path
    name: str
    size: int | None = None

    @cached_property
    def files(self) -> list[Path]:
        """The files."""
        return find_images(self.path)

    @property
    def count(self) -> int:
        """Number of files."""
        return len(self.files)

    @cached_property
    def side(self) -> int:
        """Side of the images that `batches` gives."""
        return self.size or _square(self.files[0], _header(self.files[0]))

    @cached_property
    def headers(self) -> list["_Header"]:
        """Size and mode of every file."""
        return [_header(file) for file in self.files]

    @cached_property
    def channels(self) -> int:
        """Channels of the images that `batches` gives."""
        return 1 if all(header.mode in GREY for header in self.headers) else 3

    def require_readable(self) -> None:
        """Refuse files that are not images, and without a `size` those that are not equal squares, by their headers.

        Raises:
            UserError: names the file.
        """
        for file, header in zip(self.files, self.headers, strict=True):
            if self.size is None and _square(file, header) != self.side:
                raise UserError(f"size: {file} is not {self.side}x{self.side} as the first image; give a size")

    @cached_property
    def _content(self) -> tuple[str, int]:
        """Hash of the files' bytes, in order, and the number of files with lossy compression."""
        digest, lossy = hashlib.sha256(), 0
        for file in self.files:
            require_file(file)
            content = file.read_bytes()
            digest.update(content)
            lossy += _is_lossy(content)
        return digest.hexdigest(), lossy

    @property
    def digest(self) -> str:
        """Hash of the files' bytes, in order."""
        return self._content[0]

    def identity(self) -> dict[str, Any]:
        """The files' content and the size."""
        return {"files": self.digest, "images": self.count, "size": self.side}

    def facts(self) -> dict[str, Any]:
        """Provenance: hash and number of the files."""
        facts = {"source": self.name, "kind": "folder", "images": self.count, "sha256": self.digest, "size": self.side}
        return {**facts, "resized": self.resized, "lossy": self._content[1], "rounding": None}

    @cached_property
    def resized(self) -> str:
        """What is done to the size of the images."""
        changed = self.size and any(header.size != (self.size, self.size) for header in self.headers)
        return f"centred square to {self.size}, Lanczos" if changed else "none"

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Images from number `first` on."""
        self.require_readable()
        for start in range(first, self.count, batch_size):
            files = self.files[start : start + batch_size]
            yield torch.stack([read_image(file, self.side, self.channels) for file in files])

    def stored(self) -> None:
        """None: a folder has no statistics."""


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    mode: str


def _header(file: Path) -> _Header:
    """Width, height and Pillow's mode of an image file; errors as `opened_image`."""
    with opened_image(file) as image:
        return _Header(image.size, image.mode)


def _square(file: Path, header: _Header) -> int:
    """The side of a square image."""
    width, height = header.size
    if width != height:
        raise UserError(f"size: {file} is {width}x{height}; give a size, to which squares are cropped and resized")
    return width


def _is_lossy(content: bytes) -> bool:
    """Whether a file is JPEG, or WebP with a lossy image, whatever its name is."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return content[:3] == JPEG
    place = 12  # start of a chunk, which is its name, its content's length, its content
    while place + 8 <= len(content) and content[place : place + 4] not in (b"VP8 ", b"VP8L"):
        place += 8 + (int.from_bytes(content[place + 4 : place + 8], "little") + 1) // 2 * 2
    return content[place : place + 4] == b"VP8 "


@dataclass(frozen=True)
class NpzImages:
    """An ADM-style .npz: images in `arr_0`, statistics in mu, sigma, mu_s, sigma_s, or both."""

    path: Path
    name: str

    @cached_property
    def file(self) -> NpzFile:
        """The opened file."""
        return NpzFile(self.path)

    @property
    def count(self) -> int:
        """Number of images."""
        return self.file.count

    @cached_property
    def digest(self) -> str:
        """Hash of the file."""
        return sha256(self.path)

    def identity(self) -> dict[str, Any]:
        """The file's content."""
        return {"file": self.digest, "images": self.count}

    def facts(self) -> dict[str, Any]:
        """Provenance: hash, images, and what the statistics in the file say of themselves."""
        facts: dict[str, Any] = {
            "source": self.name,
            "kind": "npz",
            "images": self.count or None,
            "sha256": self.digest,
        }
        found = self.stored()
        if found is not None:
            facts |= {"statistics of": dict(found.facts), "images in statistics": found.count}
        own = found.facts.get("source", {}) if found else {}
        facts |= {name: own.get(name) for name in INHERITED}
        facts["lossy"] = own.get("lossy", own.get("jpeg"))  # its name before
        return facts | ({"size": size_fact(*self.file.shape[1:3])} if self.count else {})

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Images from number `first` on."""
        return self.file.batches(first, self.count, batch_size)

    def stored(self) -> Statistics | None:
        """Statistics in the file."""
        return self._stored

    @cached_property
    def _stored(self) -> Statistics | None:
        return Statistics.read(self.path) if "mu" in self.file.names else None


@dataclass(frozen=True)
class TensorImages:
    """Images uint8 (N,H,W,C) in memory."""

    images: Tensor
    name: str = "tensor"

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """Hash of the images' bytes."""
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Hash of the images, and their shape: the same bytes may be other images."""
        return {"pixels": self.digest, "n": self.count, "shape": list(self.images.shape[1:])}

    def facts(self) -> dict[str, Any]:
        """Provenance: number and hash."""
        facts = {"source": self.name, "kind": "tensor", "images": self.count, "sha256": self.digest}
        return {**facts, "size": size_fact(*self.images.shape[1:3]), "rounding": None}

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Images from number `first` on."""
        return iter(self.images[first:].split(batch_size))

    def stored(self) -> None:
        """None: a tensor has no statistics."""


def key_of(*parts: Any) -> str:
    """A hash of JSON values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def image_files(path: Path, size: int | None = None) -> FolderImages | NpzImages:
    """The images of a folder or an .npz.

    Raises:
        UserError: no such file or folder, or nothing in it.
    """
    if is_npz(path):
        images = NpzImages(path, str(path))
        if size is not None and images.count and images.file.shape[1:3] != (size, size):
            own = size_fact(*images.file.shape[1:3])
            what = f"of side {own}" if isinstance(own, int) else own
            raise UserError(f"size: {path} holds images {what}; an .npz is not resized")
        return images
    path = folder_of_images(path)
    return FolderImages(path, str(path), size)


def require_images(images: Tensor) -> Sequence[int]:
    """The shape of images uint8 (N,H,W,C).

    Raises:
        UserError: another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise UserError(f"samples: images are uint8 (N,H,W,C), N > 0; got {images.dtype} {tuple(images.shape)}")
    return images.shape
