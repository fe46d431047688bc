"""Folders of images: what is in them, and what `dkdm sample` and `dkdm decode` wrote."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.images.pixels import GRID, MODES, SAMPLED, SUFFIXES, read_images
from ldm_dkdm.npz import is_npz, square_npz
from ldm_dkdm.reporting import Progress, counted, logger


def load_images(path: str | Path, size: int, channels: int = 3, progress: bool | Progress = False) -> Tensor:
    """Read a folder of images or an ADM-style .npz (`arr_0`) -> uint8 (N,size,size,channels).

    Folder images are turned as their EXIF data say, composited on white, cropped to a centred square and resized.
    """
    path = expanded(path)
    if is_npz(path):
        return square_npz(path, size, channels)
    return read_images(find_images(path, channels), size, channels, progress)


def folder_of_images(path: Path) -> Path:
    """A folder, or, where `dkdm sample` or `dkdm decode` wrote it, the folder of the images in it.

    A warning counts the images outside the latter.
    """
    if not _is_output(path):
        return path
    others = 0
    with suppress(OSError):  # a folder beside it that must not be read
        others = sum(1 for _ in images_beside(path))
    if others:
        logger.warning(
            f"{path}: its images are those in img, since {GRID} beside it says that dkdm wrote them; "
            f"{counted(others, 'image')} outside img {'is' if others == 1 else 'are'} left out"
        )
    return path / "img"


def images_beside(path: Path, most: int | None = None) -> Iterator[Path]:
    """The images below a folder that are neither in its `img`, nor grids, nor in runs and outputs of `dkdm sample`.

    Args:
        path: the folder.
        most: files that are looked at; None: all.
    """
    if _is_run(path):
        return

    def own(folder: Path) -> bool:
        return folder == path / "img" or folder.name.startswith(".") or _is_output(folder) or _is_run(folder)

    for file in islice(_files_below(path, (), own), most):
        if file.suffix.lower() in SUFFIXES and not (file.name.startswith(".") or _is_grid(file)):
            yield file


def _is_output(folder: Path) -> bool:
    """Whether `dkdm sample` or `dkdm decode` has written a folder."""
    return (folder / GRID).is_file() and (folder / "img").is_dir()


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def find_images(path: Path, channels: int = 3) -> list[Path]:
    """The image files below a folder, sorted, linked folders included; a warning counts the other files.

    Grids of samples, which `dkdm sample` and `dkdm decode` write beside the images, are other files.

    Raises:
        UserError: no such folder, a file, no images in it, or `channels` that image files do not have.
    """
    if not path.is_dir():
        fault = (
            "is neither a folder of images nor an .npz" if path.exists() else "no such folder of images or .npz file"
        )
        raise UserError(f"{path}: {fault}")
    path = folder_of_images(path)
    if channels not in MODES:
        raise UserError(
            f"{path}: image files are grey or RGB; images of {channels} channels are read from an .npz "
            f"with arr_0 uint8 (N,H,W,{channels})"
        )
    files: list[Path] = []
    others: Counter[str] = Counter()
    for file in _files_below(path, ()):
        image, hidden = file.suffix.lower() in SUFFIXES, _hidden(file.relative_to(path))
        if image and not hidden and _is_grid(file):
            others[f"{GRID} of samples"] += 1
        elif image and not hidden:
            files.append(file)
        elif image or not hidden:
            others["hidden" if hidden else file.suffix or "without a suffix"] += 1
    rest = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
    kinds = ", ".join(sorted(SUFFIXES))
    if not files:
        raise UserError(f"{path}: the folder holds no images ({kinds})" + (f", but {rest}" if rest else ""))
    if others:
        logger.warning(f"{path}: {len(files)} images; {others.total()} other files are not read ({rest})")
    return sorted(files)


def count_images(path: Path, most: int) -> int:
    """Number of image files below a folder, up to `most`, by their suffixes; hidden ones do not count."""
    files = (file for file in _files_below(path, ()) if file.suffix.lower() in SUFFIXES)
    return sum(1 for _ in islice((file for file in files if not _hidden(file.relative_to(path))), most))


def _files_below(
    folder: Path, above: tuple[Path, ...], passed: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """All files below a folder, without folders that are `passed` over.

    Links to folders are followed, except to those `above`, which would never end.
    """
    here = folder.resolve()
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not passed(Path(entry.path)):
                    yield from _files_below(Path(entry.path), (*above, here), passed)
            else:
                yield Path(entry.path)


def _is_grid(file: Path) -> bool:
    """Whether an image is the grid of what lies beside it."""
    return file.name == GRID and any((file.parent / name).exists() for name in SAMPLED)


def _hidden(path: Path) -> bool:
    """Whether a file, or a folder above it, is hidden, such as .ipynb_checkpoints."""
    return any(part.startswith(".") for part in path.parts)
