"""Image files as arrays of pixels, and these as the states of networks."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm_dkdm.errors import UserError, interruptible, unreadable
from ldm_dkdm.files import require_file
from ldm_dkdm.reporting import Progress, following

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow's names; it opens no others
PIXELS = 1 << 26  # most pixels in an image file; Pillow takes up to 32 bytes for each
HEADER = 1 << 16  # most bytes of a PPM or PGM header; Pillow reads them one by one
COMMENTS = 10_000  # most comments in a plain PPM or PGM; Pillow copies a block of its numbers for each
PLAIN = (b"P1", b"P2", b"P3")  # PPM and PGM whose pixels are numbers in ASCII
BLOCK = 1 << 20  # bytes read at once
GRID = "grid.png"  # file name of the grid of samples beside the images of `dkdm sample` and `dkdm decode`
SAMPLED = ("img", "samples.npz", "latents.safetensors")  # what these commands write beside it
MODES = {1: "L", 3: "RGB"}  # channels of an image file -> Pillow's mode


def read_images(files: Sequence[Path], size: int, channels: int, progress: bool | Progress) -> Tensor:
    """Image files -> uint8 (N,size,size,channels); errors as `read_image`."""
    images = []
    with following(progress, "reading", "image", len(files)) as done:
        for file in files:
            images.append(read_image(file, size, channels))
            done(len(images))
    return torch.stack(images)


def read_image(path: Path, size: int, channels: int = 3) -> Tensor:
    """One image file -> uint8 (size,size,channels): upright, on white, centred square, Lanczos.

    Of an animation the first frame.

    Raises:
        UserError: a file that cannot be read, or numbers whose range is unknown.
    """
    with opened_image(path) as file:
        square = _on_white(_square(file)).convert(MODES[channels])
        pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).copy()
    return torch.from_numpy(pixels).view(size, size, channels)


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """An image file whose pixels are not read yet; errors in the block are blamed on the file.

    Raises:
        UserError: a file that cannot be read, or one of too many pixels; it names the file.
    """
    require_file(path)
    try:
        _require_few_comments(path)
        # a damaged TIFF may bring a warning for each of 65,535 tags
        with warnings.catch_warnings(action="ignore"), interruptible(), Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > PIXELS:
                raise Image.DecompressionBombError(f"{file.width} x {file.height}, more than {PIXELS}")
            yield file
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has too many pixels to be read safely; scale it down first ({error})") from error
    except Exception as error:  # readers of damaged files raise errors of many classes
        raise unreadable(path, f"not a readable image: {error or type(error).__name__}", error) from error


def _square(file: Image.Image) -> Image.Image:
    """The centred square of an image, upright."""
    image = ImageOps.exif_transpose(_of_8_bits(file))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _require_few_comments(path: Path) -> None:
    """Let an image pass unless it is a PPM or PGM of very long or very many comments.

    Raises:
        ValueError: its size does not stand in its first 64 KiB, or a plain file has more than 10,000 comments.
    """
    with path.open("rb") as file:
        head = file.read(HEADER)
        if head[:1] != b"P":
            return
        numbers = re.sub(rb"#[^\r\n]*", b"", head).split(maxsplit=3)
        if len(head) == HEADER and len(numbers) < 4:  # the kind, width, height, and what follows
            raise ValueError(f"a header of more than {HEADER} bytes")
        if head[:2] in PLAIN:
            file.seek(0)
            if sum(block.count(b"#") for block in iter(lambda: file.read(BLOCK), b"")) > COMMENTS:
                raise ValueError(f"more than {COMMENTS} comments")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white


def _has_pages(image: Image.Image) -> bool:
    """Whether a second page follows; a file may claim any number of them."""
    try:
        image.seek(1)
    except EOFError:
        return False
    return True


def _of_8_bits(image: Image.Image) -> Image.Image:
    """An image as it is, or 16-bit grey divided by 257; Pillow's `convert` would cut at 255.

    Raises:
        ValueError: numbers of unknown range, several pages, or a transparent colour of 16 bits.
    """
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    stored = tiles[0][3] if image.format == "PNG" and tiles else ""
    if clear is not None and stored == "RGB;16B":
        raise ValueError("a colour of 16 bits is transparent, which is not read; write it with an alpha channel")
    if clear is not None and stored in ("L;2", "L;4"):  # Pillow makes 8 bits of the levels, not of this one
        image.info["transparency"] = clear * 255 // (2 ** int(stored[2]) - 1)
    if image.format == "TIFF" and _has_pages(image):
        raise ValueError("it has several pages; write each as a file of its own")
    tags = getattr(image, "tag_v2", {})  # TIFF's
    bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))):
        if image.mode in ("I", "F"):
            raise ValueError(f"its numbers (mode {image.mode}) have no known range; write it with 8 or 16 bits")
        return image
    levels = np.asarray(image).astype(np.float32)
    if clear is not None:
        levels[levels == clear] = 2**bits - 1
    levels *= 255 / (2**bits - 1)  # every step works in place: an image may have tens of millions of pixels
    if inverted:
        np.subtract(255, levels, out=levels)
    grey = Image.fromarray(levels.round(out=levels).clip(0, 255, out=levels).astype(np.uint8))
    grey.info["exif"] = image.getexif().tobytes()
    return grey


def to_signed(images: Tensor) -> Tensor:
    """Images uint8 (B,H,W,C) -> float32 (B,C,H,W) in [-1,1]; contiguous, since channels_last is slow on a CPU."""
    return images.movedim(-1, 1).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor, nearest: bool = False) -> Tensor:
    """Images (B,C,H,W), nominally in [-1,1], -> uint8 (B,H,W,C).

    Values are truncated, as CompVis's and guided-diffusion's scripts do, or rounded to the `nearest` level.
    """
    levels = (images.float() + 1) * 127.5
    return (levels.round() if nearest else levels).clamp(0, 255).to(torch.uint8).movedim(1, -1)
