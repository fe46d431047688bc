"""Read images out of an .npz batch by batch, compressed or not, without loading an array in C order."""

import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.evaluation.conversions import blocks_of, conversion, is_channels_first
from ldm_dkdm.npz import array_names, opened_array, read_npz

IMAGES = "arr_0"


class NpzFile:
    """The images `arr_0` of an .npz, uint8 (N,H,W,C), or (N,H,W) for grey ones.

    Attributes:
        names: arrays in the file. shape: of the images (N,H,W,C); (0,0,0,0) if there are none.
        fortran: they are stored in Fortran order, so that every image is all over the file, which is read at once.

    Raises:
        UserError: no such file, or not an .npz of images or statistics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = array_names(path)
        self.fortran = False
        with blaming(path, "is not an .npz of images in arr_0"), zipfile.ZipFile(path) as archive:
            self.shape = self._shape(archive) if IMAGES in self.names else (0, 0, 0, 0)
        if not self.names & {IMAGES, "mu"}:
            named = f"{path}: holds {', '.join(sorted(self.names))}; images are in arr_0, statistics in mu, sigma"
            raise UserError(f"{named}{self._renamed()}")

    @property
    def count(self) -> int:
        """Number of images."""
        return self.shape[0]

    def _shape(self, archive: zipfile.ZipFile) -> tuple[int, int, int, int]:
        with opened_array(archive, IMAGES) as (member, shape, fortran, kind):
            self.fortran = fortran
            if kind != np.uint8 or len(shape) not in (3, 4) or min(shape) < 1:
                load, values = self._loading(IMAGES), blocks_of(member, kind)
                how = "" if kind == np.uint8 else conversion(load, shape, kind, values)
                raise UserError(f"{self.path}: arr_0 is {kind} {shape}; images are uint8 (N,H,W,C){how}")
        if len(shape) == 3:
            shape = (*shape, 1)
        if is_channels_first(shape):
            raise UserError(
                f"{self.path}: arr_0 is {kind} {shape}, which looks like (N,C,H,W); images are uint8 (N,H,W,C): "
                "write it with numpy.moveaxis(arr_0, 1, -1)"
            )
        return shape[0], shape[1], shape[2], shape[3]

    def _loading(self, name: str) -> str:
        return f"numpy.load({str(self.path)!r})[{name!r}]"

    def _renamed(self) -> str:
        """How the one array that may be images becomes arr_0; empty where there is none, or several."""
        found = []
        with zipfile.ZipFile(self.path) as archive:
            for name in sorted(self.names):
                with (
                    suppress(UserError, SyntaxError, TokenError),
                    blaming(self.path),
                    opened_array(archive, name) as (member, shape, _, kind),
                ):
                    found.append(conversion(self._loading(name), shape, kind, blocks_of(member, kind)))
        lines = list(filter(None, found))
        return lines[0] if len(lines) == 1 else ""

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[Tensor]:
        """Images uint8 (B,H,W,C), numbers `first` ... `last` - 1.

        Raises:
            UserError: the file ends before its last image.
        """
        if self.fortran:
            array = read_npz(self.path)
            assert array is not None  # `arr_0`
            for start in range(first, last, batch_size):
                part = np.ascontiguousarray(array[start : min(start + batch_size, last)])
                yield torch.from_numpy(part).view(len(part), *self.shape[1:])
            return
        each = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, opened_array(archive, IMAGES) as (member, *_):
            member.seek(first * each, 1)
            for start in range(first, last, batch_size):
                count = min(batch_size, last - start)
                with blaming(self.path):
                    content = member.read(count * each)
                if len(content) < count * each:
                    raise UserError(f"{self.path}: is damaged, it ends before image {start + count} of {self.count}")
                yield torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, *self.shape[1:])
