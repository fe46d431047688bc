"""Read arrays of numbers from .npz archives; what a header claims is checked before it takes memory."""

import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from ldm_dkdm.errors import MALFORMED, UserError, interruptible
from ldm_dkdm.files import require_file
from ldm_dkdm.reporting import size

SMALL = 1 << 30  # bytes of an array that are read whatever they take in the file
PACKED = 20  # largest accepted size of a larger array in units of its file's
BLOCK = 1 << 24  # bytes read at once
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what np.savez and np.savez_compressed write
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
NUMBERS = "biuf"  # NumPy's kinds: flags, integers, floating point


def read_npz(path: Path, name: str = "arr_0") -> np.ndarray | None:
    """An array of an .npz, in this machine's byte order; None if it is missing and not `arr_0`.

    Raises:
        UserError: no such file, not an .npz, an array of anything but numbers, or one that claims more than there is.
    """
    require_file(path)
    try:
        with interruptible(), zipfile.ZipFile(path) as archive:
            if f"{name}.npy" in archive.namelist() or name == "arr_0":
                return _read(archive, archive.getinfo(f"{name}.npy"), path.stat().st_size)
            return None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, *MALFORMED, MemoryError, SyntaxError, tokenize.TokenError, zlib.error) as error:
        raise UserError(f"{path}: not an .npz with an array {name}: {error}") from error


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file_size: int) -> np.ndarray:
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
        needed = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or needed > entry.file_size:
            raise ValueError(f"it claims the shape {shape}, for which it holds too little")
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
