"""Principal components of a reference's pixels as features, in memory that does not grow with its number of images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.evaluation.extractor import Extractor, Features
from ldm_dkdm.evaluation.frechet import COMPONENTS, IMAGES, PixelBasis, spread
from ldm_dkdm.evaluation.gathering import require_cache
from ldm_dkdm.evaluation.partial import LAYOUT
from ldm_dkdm.evaluation.samples import ModelImages
from ldm_dkdm.evaluation.sources import FolderImages, ImageSource, key_of
from ldm_dkdm.files import replacing
from ldm_dkdm.model.ranks import joined
from ldm_dkdm.npz import read_arrays
from ldm_dkdm.reporting import Progress, following, logger

NAME = "pixel components"


@dataclass(frozen=True)
class PixelComponents(Extractor):
    """Projects images on the principal components of one reference; `sha256` is the hash of mean and components."""

    basis: PixelBasis | None = None

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B,H,W,C) of any number of channels -> (B,K), float64."""
        assert self.basis is not None  # set by `pixel_components`
        return Features(torch.from_numpy(self.basis.project(self.coloured(images))))

    @property
    def moments(self) -> bool:
        """True: there are few components."""
        return True

    @property
    def opener(self) -> Extractor:
        """The extractor itself, since no file of weights has to be opened."""
        return self


@dataclass(frozen=True)
class DrawnImages(ModelImages):
    """Samples of a model whose first ones are in memory."""

    drawn: Tensor | None = None

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Samples from number `first` on."""
        assert self.drawn is not None  # set by `_kept`
        if first < len(self.drawn):
            yield from self.drawn[first:].split(batch_size)
        first = max(first, len(self.drawn))
        if first < self.count:
            yield from super().batches(first, batch_size)


def pixel_components(
    reference: ImageSource, cache: Path | None, batch_size: int, progress: bool | Progress = False, rgb: bool = False
) -> tuple[PixelComponents, ImageSource]:
    """Features of the components of a reference's pixels, and the reference.

    The components are those of at most IMAGES images: of a model, whose samples are independent, the first, and these
    stay in memory so that they are not drawn twice; of others images at even distances. They are kept in the cache.
    Of several ranks the first computes them. With `rgb`, grey images are repeated to RGB.

    Raises:
        UserError: fewer images than the components need, or images that are all the same.
    """
    if not reference.count:
        raise UserError(f"{reference.name}: holds no images, whose pixels pixel-frechet needs")
    require_enough(reference.count)
    used: list[Tensor] = []
    basis = joined().on_first(lambda: _basis(reference, cache, batch_size, progress, used.append, rgb))
    reference = _kept(reference, used[0]) if used else reference
    digest = key_of(*(array.numpy().tobytes().hex() for array in (basis.mean, basis.components)))
    components = PixelComponents(NAME, "pixels", None, digest, "none", torch.device("cpu"), basis=basis)
    return components.repeating_grey() if rgb else components, reference


def _basis(
    reference: ImageSource,
    cache: Path | None,
    batch_size: int,
    progress: bool | Progress,
    keep: Callable[[Tensor], None],
    rgb: bool,
) -> PixelBasis:
    """Components from their file of the cache, or from images, which `keep` gets."""
    key = key_of(LAYOUT, reference.identity(), IMAGES, COMPONENTS, *(["RGB"] if rgb else []))
    file = cache / f"{key}.components.npz" if cache else None
    known = _cached(file) if file is not None and file.is_file() else None
    if known is not None:
        return known
    require_cache(cache)
    images = _some(reference, batch_size, progress)
    basis = PixelBasis.of(images.expand(-1, -1, -1, 3) if rgb else images)
    if file is not None:
        with replacing(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, mean=basis.mean.numpy(), components=basis.components.numpy())
    keep(images)
    return basis


def require_enough(*counts: int | None) -> None:
    """Refuse sets of fewer images than a covariance of the components needs.

    Raises:
        UserError: such a set.
    """
    if any(count is not None and count <= COMPONENTS for count in counts):
        raise UserError(f"metrics: pixel-frechet needs {COMPONENTS + 1} images or more in both sets")


def _cached(file: Path) -> PixelBasis | None:
    """Components of the cache; None where the file is damaged, which removes it."""
    try:
        with blaming(file):
            found = read_arrays(file)
            mean, components = (torch.from_numpy(found[name]) for name in ("mean", "components"))
            if components.shape[:-1] != mean.shape or {mean.dtype, components.dtype} != {torch.float64}:
                raise UserError(f"{file}: does not hold principal components")
            return PixelBasis(mean, components)
    except UserError as error:
        logger.warning(f"{error}; it is removed, and the components are computed again")
        file.unlink(missing_ok=True)
        return None


def _kept(reference: ImageSource, images: Tensor) -> ImageSource:
    if not isinstance(reference, ModelImages):
        return reference
    return DrawnImages(reference.model, reference.config, reference.name, reference.clock, images)


def _some(source: ImageSource, batch_size: int, progress: bool | Progress) -> Tensor:
    """Images uint8 (N,H,W,C) that components are computed from."""
    numbers = spread(source.count)
    if isinstance(source, ModelImages):
        numbers = torch.arange(len(numbers), device="cpu")
    found: Tensor | None = None
    done = 0
    with following(progress, f"components of {source.name}", "image", len(numbers)) as show:
        for images in _picked(source, numbers, batch_size):
            found = images.new_empty(len(numbers), *images.shape[1:]) if found is None else found
            if images.shape[1:] != found.shape[1:]:
                raise UserError(f"{source.name}: its images have several sizes")
            found[done : done + len(images)] = images
            done += len(images)
            show(done)
    assert found is not None  # the source has images
    return found


def _picked(source: ImageSource, numbers: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The images of ascending numbers, in parts; a folder's other files are not read."""
    if isinstance(source, FolderImages):
        yield from (next(source.batches(number, 1)) for number in numbers.tolist())
        return
    first = 0
    for images in source.batches(0, batch_size):
        own = numbers[(numbers >= first) & (numbers < first + len(images))]
        if len(own):
            yield images[own - first]
        first += len(images)
        if first > numbers[-1]:
            return
