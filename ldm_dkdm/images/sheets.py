"""Pictures made of images: grids, and grids side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm_dkdm.files import replacing


def to_image(image: Tensor) -> Image.Image:
    """An image uint8 (H,W,C): RGB for C = 3, grey for 1; of other numbers every channel in grey, side by side."""
    shown = image if image.shape[-1] == 3 else image.movedim(-1, 1).flatten(1)
    return Image.fromarray(shown.contiguous().numpy())


def grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images uint8 (N,H,W,C) out in rows, on white; nearly square unless `columns` is given."""
    panels = [to_image(image) for image in images]
    count, (width, height) = len(panels), panels[0].size
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def side_by_side(panels: Sequence[tuple[str, Image.Image]], margin: int = 16) -> Image.Image:
    """Set labelled images of one size next to each other; tiny ones are magnified to their labels' width."""
    font = ImageFont.load_default(size=18)
    factor = max(1, min(int(font.getlength(label)) // panel.width for label, panel in panels))
    panels = [(label, p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST)) for label, p in panels]
    widths = [max(panel.width, math.ceil(font.getlength(label))) for label, panel in panels]
    width = sum(widths) + margin * (len(panels) + 1)
    sheet = Image.new("RGB", (width, max(panel.height for _, panel in panels) + 3 * margin + 8), "white")
    draw, left = ImageDraw.Draw(sheet), margin
    for (label, panel), room in zip(panels, widths, strict=True):
        draw.text((left, margin // 2), label, fill="black", font=font)
        sheet.paste(panel, (left, 2 * margin + 8))
        left += room + margin
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
