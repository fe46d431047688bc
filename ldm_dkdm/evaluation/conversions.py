"""Say how an array becomes a set of images, in NumPy's words."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ldm_dkdm.errors import UserError, blaming

CHANNELS = (1, 3)  # channel counts of grey and RGB images
BLOCK = 1 << 20  # values of an array that are looked at at once
MOST = 1 << 28  # values of a larger array in a file of its own are looked at in steps
BRIGHT, EXTREME = 128, 0.9  # what images reach: values of 8 bits, and values in [-1,1] on both sides


def blocks_of(member: IO[bytes], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The values of a stream of numbers, block by block.

    Raises:
        OSError, EOFError, BadZipFile, zlib.error: a damaged one.
    """
    while content := member.read(BLOCK * dtype.itemsize):
        yield np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a shape looks like (N,C,H,W)."""
    return len(shape) == 4 and shape[3] not in CHANNELS and shape[1] in CHANNELS and shape[1] != shape[2]


def conversion(load: str, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[np.ndarray]) -> str:
    """How to write an array as a set of images; empty where none of the usual ranges fits, or several may.

    Args:
        load: the expression that loads it.
        shape: of the array. dtype: its type.
        blocks: its values, which show the range: 0 ... 255, [0,1] or [-1,1].
    """
    images = "numpy.moveaxis(images, 1, -1)" if is_channels_first(shape) else "images"
    fits = len(shape) == 3 or (len(shape) == 4 and (shape[3] in CHANNELS or is_channels_first(shape)))
    found = _as_uint8(images, dtype, blocks) if fits and 0 not in shape else None
    return f"; with images = {load}, numpy.savez('FILE.npz', {found}) writes one" if found else ""


def _as_uint8(images: str, dtype: np.dtype, blocks: Iterable[np.ndarray]) -> str | None:
    if dtype == np.uint8:
        return images
    if dtype.kind == "b":
        return f"255 * {images}.astype('uint8')"
    known = _range_of(blocks) if dtype.kind in "iuf" else None
    if known is None:
        return None
    low, high, between = known
    if low >= 0 and high >= BRIGHT:  # labels and masks use small numbers
        return f"{images}{'.round()' if dtype.kind == 'f' else ''}.astype('uint8')"
    if low >= 0 and high <= 1 and between:  # 0 and 1 alone may be a mask, or dark 8-bit values
        return f"(255 * {images}).round().astype('uint8')"
    if -1 <= low <= -EXTREME and EXTREME <= high <= 1 and between:  # latents seldom reach both and pass neither
        return f"(127.5 * ({images} + 1)).round().astype('uint8')"
    return None


def _range_of(blocks: Iterable[np.ndarray]) -> tuple[float, float, bool] | None:
    """The least and the largest value, and whether any lies in (0,1); None outside [-1,255], for NaN or damage."""
    low, high, between = 255.0, -1.0, False
    try:
        for values in blocks:
            with np.errstate(invalid="ignore"):
                low, high = np.minimum(low, values.min()), np.maximum(high, values.max())
                between = between or bool(((values > 0) & (values < 1)).any())
            if not (low >= -1 and high <= 255):
                return None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return float(low), float(high), between


def refuse_npy(path: Path) -> None:
    """Refuse a file of one array, and say how it becomes a set of images.

    Raises:
        UserError: such a file.
    """
    if path.suffix.lower() != ".npy" or not path.is_file():
        return
    with blaming(path, "is not an array of numbers"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    values = array.ravel(order="K")[:: array.size // MOST + 1]  # a view
    blocks = (np.asarray(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK))
    how = conversion(f"numpy.load({str(path)!r})", array.shape, array.dtype, blocks)
    what = f"is an array {array.dtype} {array.shape}; a set of images is an .npz with arr_0 uint8 (N,H,W,C)"
    raise UserError(f"{path}: {what}{how}")
