"""Refuse outputs of commands that cannot be written, before the work whose results they should hold."""

from pathlib import Path

from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.files import require_place


def require_writable(path: Path | None, flag: str, *, folder: bool = False) -> None:
    """Refuse a file, or a `folder` of files, that cannot be written.

    Raises:
        UserError: names the flag, and what is in the way: a folder or file, a pipe or a device, no permission.
    """
    if path is None:
        return
    if not folder and path.is_dir():
        raise UserError(f"{flag}: {path} is a folder; name a file in it")
    for place in (path, *path.parents) if folder else ():
        if place.exists() and not place.is_dir():
            raise UserError(f"{flag}: {place} is a file; name a folder")
    with naming(flag):
        require_place(path, folder)


def require_outputs(folder: Path, flag: str, *names: str) -> None:
    """Refuse a folder where files of these names, or folders if they have no suffix, cannot be written.

    Raises:
        UserError: as `require_writable`.
    """
    require_writable(folder, flag, folder=True)
    for name in names:
        require_writable(folder / name, flag, folder="." not in name)


def require_kept(place: Path, folder: bool = False) -> None:
    """Refuse to measure what could not be kept beside a model.

    Raises:
        UserError: the file, or the folder, cannot be written; it names the flag for another file.
    """
    try:
        require_place(place, folder)
    except UserError as error:
        raise UserError(f"{error}; name a file for the figures with -o") from error
