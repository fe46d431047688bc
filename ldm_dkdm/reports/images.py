"""Images for a page: data URIs, made smaller where they are large."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MAX_SIDE = 768  # pixels of an image in the page
MAX_BYTES = 200_000  # largest image file that goes into the page as it is
QUALITY = 88  # quality of WebP images


@dataclass(frozen=True)
class PageImage:
    """An image in the page: its data URI, and its size in pixels before it was made smaller."""

    uri: str
    width: int
    height: int


def page_image(file: Path) -> PageImage:
    """A PNG as it is, or, if it is large, as WebP of at most MAX_SIDE pixels.

    Raises:
        OSError: not a PNG, or a damaged one.
    """
    content = file.read_bytes()
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.load()
        width, height = image.size
        if max(width, height) > MAX_SIDE or len(content) > MAX_BYTES:
            return PageImage(_uri("webp", _as_webp(image)), width, height)
    return PageImage(_uri("png", content), width, height)


def _as_webp(image: Image.Image) -> bytes:
    smaller = image.convert("RGB")
    smaller.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    smaller.save(file, "WEBP", quality=QUALITY)
    return file.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
