"""Say how an array that is no set of images becomes one, in NumPy's words."""

import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from ldm_dkdm.errors import UserError, blaming

CHANNELS = (1, 3)  # channel counts of grey and RGB images
SEEN = 1 << 21  # values of an array that show its range


def first_values(member: IO[bytes], dtype: np.dtype) -> np.ndarray:
    """The first values of a stream of numbers; none of a damaged one."""
    try:
        content = member.read(SEEN * dtype.itemsize)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        content = b""
    return np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a shape looks like (N,C,H,W)."""
    return len(shape) == 4 and shape[3] not in CHANNELS and shape[1] in CHANNELS and shape[1] != shape[2]


def conversion(load: str, shape: tuple[int, ...], values: np.ndarray) -> str:
    """How to write an array as a set of images; empty where none of the usual ranges fits.

    Args:
        load: the expression that loads it.
        shape: of the array.
        values: its first ones, which show the range: uint8, 0 ... 255, [0,1] or [-1,1].
    """
    images = "numpy.moveaxis(images, 1, -1)" if is_channels_first(shape) else "images"
    fits = len(shape) == 3 or (len(shape) == 4 and (shape[3] in CHANNELS or is_channels_first(shape)))
    found = _as_uint8(images, values) if fits and values.size and values.dtype.kind in "biuf" else None
    return f"; with images = {load}, numpy.savez('FILE.npz', {found}) writes one" if found else ""


def _as_uint8(images: str, values: np.ndarray) -> str | None:
    if values.dtype == np.uint8:
        return images
    if values.dtype.kind == "b":
        return f"255 * {images}.astype('uint8')"
    with np.errstate(invalid="ignore"):
        low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return f"(255 * {images}).round().astype('uint8')"
    if values.dtype.kind == "f" and low >= -1 and high <= 1:
        return f"(127.5 * ({images} + 1)).round().astype('uint8')"
    if low >= 0 and high <= 255:
        return f"{images}{'.round()' if values.dtype.kind == 'f' else ''}.astype('uint8')"
    return None  # NaN too


def refuse_npy(path: Path) -> None:
    """Refuse a file of one array, and say how it becomes a set of images.

    Raises:
        UserError: such a file.
    """
    if path.suffix.lower() != ".npy":
        return
    with blaming(path, "is not an array of numbers"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    how = conversion(f"numpy.load({str(path)!r})", array.shape, np.asarray(array.flat[:SEEN]))
    what = f"is an array {array.dtype} {array.shape}; a set of images is an .npz with arr_0 uint8 (N,H,W,C)"
    raise UserError(f"{path}: {what}{how}")
