"""Refuse outputs of commands that cannot be written, before the work whose results they should hold."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm_dkdm.errors import MALFORMED, UserError, naming
from ldm_dkdm.files import JSON_BYTES, exists, expanded, read_text, require_place

BEGINNINGS = {  # what files of a kind begin with, in small letters
    "a PNG image": b"\x89png\r\n\x1a\n",
    "an HTML page": b"<!doctype html",
    "a table of evaluations": b"| model ",
}
KEYS = {  # what JSON files of a kind hold
    "figures of two sets": {"figures", "samples"},
    "figures of a student (-r)": {"student_parameters"},
}


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
        UserError: as `require_writable`; a PNG or .npz of such a name holds something else.
    """
    require_writable(folder, flag, folder=True)
    for name in names:
        require_writable(folder / name, flag, folder="." not in name)
        if name.endswith(".png"):
            require_replaceable(folder / name, flag, "a PNG image")
        if name.endswith(".npz"):
            arrays_of_images(folder / name, flag)


def arrays_of_images(path: Path, flag: str) -> set[str]:
    """The arrays in an .npz of images that an output replaces; none without a file, or in an empty one.

    Raises:
        UserError: it holds other arrays than images and labels.
    """
    if not path.exists() or path.stat().st_size == 0:
        return set()
    from ldm_dkdm.evaluation.npz import NpzFile

    with naming(flag):
        names = NpzFile(path).names
    if not names <= {"arr_0", "arr_1"}:
        raise UserError(f"{flag}: {path} exists and holds {', '.join(sorted(names))}; name another folder")
    return names


def require_kept(place: Path, folder: bool = False) -> None:
    """Refuse to measure what could not be kept beside a model.

    Raises:
        UserError: the file, or the folder, cannot be written; it names the flag for another file.
    """
    try:
        require_place(place, folder)
    except UserError as error:
        raise UserError(f"{error}; name a file for the figures with -o") from error


def require_replaceable(path: Path | None, flag: str, kind: str) -> None:
    """Refuse to write over a file that is not an earlier output of this kind; an empty one is.

    Args:
        path: the output, if it is wanted.
        flag: what named it.
        kind: a key of `BEGINNINGS` or `KEYS`.

    Raises:
        UserError: names the flag and the file.
    """
    if path is None or not path.exists() or path.stat().st_size == 0:
        return
    if kind in BEGINNINGS:
        start = BEGINNINGS[kind]
        with path.open("rb") as file:
            known = file.read(len(start)).lower() == start
    else:
        known = KEYS[kind] <= _keys(path)
    if not known:
        raise UserError(f"{flag}: {path} exists and does not hold {kind}; name another file")


def _keys(path: Path) -> set[str]:
    """The keys of a JSON object; none of another file."""
    try:
        tree = json.loads(read_text(path, JSON_BYTES))
    except (UserError, *MALFORMED):
        return set()
    return set(tree) if isinstance(tree, dict) else set()


def require_apart(outputs: Mapping[str, Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Refuse an output that is an input of the same call, or another output of it.

    Args:
        outputs: flag -> file, if it is wanted.
        inputs: paths, or names of other things.

    Raises:
        UserError: names the flag and the file.
    """
    read = {expanded(own).resolve() for own in inputs if own is not None and exists(str(own))}
    written: dict[Path, str] = {}
    for flag, path in outputs.items():
        if path is None:
            continue
        place = path.resolve()
        if place in read:
            raise UserError(f"{flag}: {path} is read by this call; name another file")
        if place in written:
            raise UserError(f"{flag}: {path} is also written as {written[place]}; name another file")
        written[place] = flag
