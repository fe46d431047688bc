"""Read arrays of numbers from .npz archives, checking headers before they take memory; write images to them."""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from ldm_dkdm.errors import MALFORMED, UserError, blaming, interruptible
from ldm_dkdm.files import replacing, require_file
from ldm_dkdm.reporting import size

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 30  # bytes of an array that are read whatever they take in the file
PACKED = 20  # largest accepted size of a larger array in units of its file's
BLOCK = 1 << 24  # bytes read at once
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what np.savez and np.savez_compressed write
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
NUMBERS = "biuf"  # NumPy's kinds: flags, integers, floating point


def is_npz(path: Path) -> bool:
    """Whether a file's name ends in .npz, in any letter case."""
    return path.suffix.lower() == ".npz"


def read_npz(path: Path, name: str = "arr_0") -> np.ndarray | None:
    """An array of an .npz, in this machine's byte order; None if it is missing and not `arr_0`.

    Raises:
        UserError: no such file, not an .npz, an array of anything but numbers, or one that claims more than there is.
    """
    require_file(path)
    try:
        with interruptible(), zipfile.ZipFile(path) as archive:
            if f"{name}.npy" in archive.namelist() or name == "arr_0":
                return _read(archive, name, path.stat().st_size)
            return None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, *MALFORMED, MemoryError, SyntaxError, tokenize.TokenError, zlib.error) as error:
        raise UserError(f"{path}: not an .npz with an array {name}: {error}") from error


def square_npz(path: Path, size: int, channels: int = 3) -> "Tensor":
    """The images uint8 (N,size,size,channels) of an ADM-style .npz; grey ones may be stored as (N,size,size)."""
    import torch

    array = read_npz(path)
    assert array is not None  # `read_npz` has refused a file without arr_0
    if array.ndim == 3 and channels == 1:
        array = array[..., None]
    if array.dtype != np.uint8 or array.shape[1:] != (size, size, channels):
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}, expected uint8 (N,{size},{size},{channels})")
    return torch.from_numpy(array)


def array_names(path: Path) -> set[str]:
    """The arrays in an .npz.

    Raises:
        UserError: no such file, or not a zip archive.
    """
    require_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with blaming(path, "is not an .npz"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_arrays(path: Path, skipped: Container[str] = ()) -> dict[str, np.ndarray]:
    """All arrays of an .npz but some; errors as `read_npz`."""
    found = {name: read_npz(path, name) for name in sorted(array_names(path)) if name not in skipped}
    return {name: array for name, array in found.items() if array is not None}


@contextmanager
def opened_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    """The values of an array as a stream, its shape, whether its order is Fortran's, and its type.

    Raises:
        KeyError: no such array.
        ValueError: an encrypted or oddly compressed one, one of anything but numbers, or of less than its shape says.
    """
    entry = archive.getinfo(f"{name}.npy")
    if entry.flag_bits & 1:
        raise ValueError("it is encrypted")
    if entry.compress_type not in METHODS:
        raise ValueError(f"its compression (method {entry.compress_type}) is not one that NumPy writes")
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        if version not in HEADERS:
            raise ValueError(f"its format {version} is not one of {', '.join(map(str, HEADERS))}")
        shape, fortran, dtype = HEADERS[version](member)
        if dtype.kind not in NUMBERS or dtype.itemsize > 8:
            raise ValueError(f"it holds {dtype.name}, not numbers of up to 64 bits")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"it claims the shape {shape}, for which it holds too little")
        yield member, shape, fortran, dtype


def _read(archive: zipfile.ZipFile, name: str, file_size: int) -> np.ndarray:
    with opened_array(archive, name) as (member, shape, fortran, dtype):
        needed = math.prod(shape) * dtype.itemsize
        if needed > max(SMALL, PACKED * file_size):
            raise ValueError(f"a file of {size(file_size)} unpacks to {size(needed)}, as no images do")
        numbers = _numbers(member, needed).view(dtype)
    numbers = numbers.astype(dtype.newbyteorder("="), copy=False)
    return numbers.reshape(shape, order="F" if fortran else "C")


def _numbers(member: IO[bytes], count: int) -> np.ndarray:
    """All that a member holds, which must be `count` bytes; the end of a zip member also checks its sum."""
    content = np.empty(count, np.uint8)
    done = 0
    while block := member.read(BLOCK):
        if done + len(block) > count:
            raise ValueError("it holds more than its shape says")
        content[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    if done < count:
        raise ValueError(f"it breaks off after {done} of {count} bytes")
    return content


class NpzWriter:
    """Writes an ADM-style .npz batch by batch, so that the images need not fit in memory.

    Args:
        file: the file, open for writing.
        count: number of all images.
    """

    def __init__(self, file: BinaryIO, count: int) -> None:
        self.archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self.member: IO[bytes] | None = None
        self.count, self.missing = count, count
        self.labels: list[np.ndarray] = []

    def add(self, images: "Tensor", labels: "Tensor | None" = None) -> None:
        """Append images uint8 (B,H,W,C) and their labels (B,)."""
        if self.member is None:
            self.member = self.archive.open("arr_0.npy", "w", force_zip64=True)
            shape = (self.count, *images.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self.member, header)
        self.member.write(images.contiguous().numpy().tobytes())
        self.missing -= len(images)
        if labels is not None:
            self.labels.append(labels.numpy())

    def close(self) -> None:
        """Finish the archive: arr_1 holds the labels int64 (N,), if any."""
        if self.member is not None:
            self.member.close()
        if self.labels:
            with self.archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(self.labels), allow_pickle=False)
        self.archive.close()


@contextmanager
def npz_writer(path: Path, count: int) -> Iterator[NpzWriter]:
    """An `NpzWriter` whose file appears at `path` once all images are in it."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = NpzWriter(file, count)
        try:
            yield writer
        finally:
            writer.close()
        if writer.missing:
            raise ValueError(f"{writer.missing} of {count} images are missing")


def save_npz(images: "Tensor", path: Path, labels: "Tensor | None" = None) -> None:
    """Write an ADM-style .npz: arr_0 uint8 (N,H,W,C), and arr_1 int64 (N,) if there are labels."""
    with npz_writer(path, len(images)) as writer:
        writer.add(images, labels)
