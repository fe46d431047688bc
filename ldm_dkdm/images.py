"""Read folders of images and ADM-style .npz; write PNG, .npz and labelled grids."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded, replacing

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load_images(path: str | Path, size: int) -> Tensor:
    """Read a folder of images or an ADM-style .npz (`arr_0`) -> uint8 (N,size,size,3).

    Folder images are composited on white, cropped to a centred square and resized.
    """
    path = expanded(path)
    if path.suffix == ".npz":
        return square_npz(path, size)
    return torch.stack([read_image(f, size) for f in find_images(path)])


def find_images(path: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder of images or .npz file")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and not _hidden(f.relative_to(path)))
    if not files:
        raise UserError(f"{path}: the folder holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def _hidden(path: Path) -> bool:
    """Whether a file, or a folder above it, is hidden, such as .ipynb_checkpoints."""
    return any(part.startswith(".") for part in path.parts)


def square_npz(path: Path, size: int) -> Tensor:
    """The images uint8 (N,size,size,3) of an ADM-style .npz."""
    array = read_npz(path)
    assert array is not None  # `read_npz` has refused a file without arr_0
    if array.dtype != np.uint8 or array.shape[1:] != (size, size, 3):
        raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}, expected uint8 (N,{size},{size},3)")
    return torch.from_numpy(array)


def read_npz(path: Path, name: str = "arr_0") -> np.ndarray | None:
    """An array of an .npz; None if it is missing and not `arr_0`."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name] if name == "arr_0" or name in archive else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not an .npz with an array {name}: {error}") from error


def read_image(path: Path, size: int) -> Tensor:
    """One image file -> uint8 (size,size,3), on white, centred square, Lanczos."""
    try:
        image = Image.open(path).convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image: {error}") from error
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = white.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).copy())


def to_signed(images: Tensor) -> Tensor:
    """Images uint8 (B,H,W,C) -> float32 (B,C,H,W) in [-1,1]; contiguous, since channels_last is slow on a CPU."""
    return images.movedim(-1, 1).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor, nearest: bool = False) -> Tensor:
    """Images (B,C,H,W), nominally in [-1,1], -> uint8 (B,H,W,C).

    Values are truncated, as CompVis's and guided-diffusion's scripts do, or rounded to the `nearest` level.
    """
    levels = (images.float() + 1) * 127.5
    return (levels.round() if nearest else levels).clamp(0, 255).to(torch.uint8).movedim(1, -1)


def endless_batches(data: Tensor, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Shuffled batches without end. Epoch e's order follows from (seed, e), so a resumed run that
    passes its `first_step` sees the batches that it would have seen.
    """
    per_epoch = len(data) // batch_size
    epoch, offset = divmod(first_step, per_epoch)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(data))
        for i in range(offset, per_epoch):
            yield data[torch.from_numpy(order[i * batch_size : (i + 1) * batch_size])]
        epoch, offset = epoch + 1, 0


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images uint8 (N,H,W,3) out in rows, on white; nearly square unless `columns` is given."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image.numpy()), (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def side_by_side(panels: Sequence[tuple[str, Image.Image]], margin: int = 16) -> Image.Image:
    """Set labelled images of one size next to each other; tiny ones are magnified to their labels' width."""
    font = ImageFont.load_default(size=18)
    factor = max(1, min(int(font.getlength(label)) // panel.width for label, panel in panels))
    panels = [(label, _magnified(panel, factor)) for label, panel in panels]
    widths = [max(panel.width, math.ceil(font.getlength(label))) for label, panel in panels]
    width = sum(widths) + margin * (len(panels) + 1)
    sheet = Image.new("RGB", (width, max(panel.height for _, panel in panels) + 3 * margin + 8), "white")
    draw, left = ImageDraw.Draw(sheet), margin
    for (label, panel), room in zip(panels, widths, strict=True):
        draw.text((left, margin // 2), label, fill="black", font=font)
        sheet.paste(panel, (left, 2 * margin + 8))
        left += room + margin
    return sheet


def _magnified(image: Image.Image, factor: int) -> Image.Image:
    """Every pixel as a square of factor x factor."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_grid(images: Tensor, path: Path) -> None:
    """Write images uint8 (N,H,W,3) as one PNG."""
    save_image(grid(images), path)


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

    def add(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Append images uint8 (B,H,W,3) and their labels (B,)."""
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


def save_npz(images: Tensor, path: Path, labels: Tensor | None = None) -> None:
    """Write an ADM-style .npz: arr_0 uint8 (N,H,W,3), and arr_1 int64 (N,) if there are labels."""
    with npz_writer(path, len(images)) as writer:
        writer.add(images, labels)
