"""Images in and out of files: folders and ADM-style .npz in; PNG, .npz and labelled grids out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_dkdm.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load_images(path: str | Path, size: int) -> Tensor:
    """Read a folder of images or an ADM-style .npz (`arr_0`) -> uint8 (N,size,size,3).

    Folder images are composited on white, cropped to a centred square and resized.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path}: the folder holds no images ({', '.join(sorted(SUFFIXES))})")
        return torch.stack([_read_image(f, size) for f in files])
    if path.suffix == ".npz" and path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            array = archive["arr_0"]
        if array.dtype != np.uint8 or array.shape[1:] != (size, size, 3):
            raise UserError(f"{path}: arr_0 is {array.dtype} {array.shape}, wanted uint8 (N,{size},{size},3)")
        return torch.from_numpy(array)
    raise UserError(f"{path}: no such folder of images or .npz file")


def _read_image(path: Path, size: int) -> Tensor:
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = white.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)).copy())


def endless_batches(data: Tensor, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Shuffled batches without end. Epoch e's order follows from (seed, e), so a resumed run that
    passes its `first_step` sees the batches that it would have seen."""
    per_epoch = len(data) // batch_size
    epoch, offset = divmod(first_step, per_epoch)
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(data))
        for i in range(offset, per_epoch):
            yield data[torch.from_numpy(order[i * batch_size : (i + 1) * batch_size])]
        epoch, offset = epoch + 1, 0
