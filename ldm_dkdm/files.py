"""Paths as users write them, and files that are written whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_dkdm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced by the home folder, which shells do not replace after `=`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a file of that name
        return Path(path)


def exists(text: str) -> bool:
    """Whether a text is the path of a file or folder; a text that cannot be a path is not."""
    try:
        return expanded(text).exists()
    except (OSError, ValueError):  # longer than a name may be, a null character
        return False


JSON_BYTES = 20_000_000  # longest accepted JSON file


def read_text(path: Path, most: int) -> str:
    """A text file of at most `most` bytes, UTF-8 with or without a mark of its byte order.

    Raises:
        OSError: no such file, no permission.
        UserError: a longer file, a folder, a pipe or a device.
        UnicodeDecodeError: another encoding.
    """
    require_file(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: is longer than {most / 1e6:g} MB, which no such file is")
    return content.decode("utf-8-sig")


def require_file(path: Path) -> None:
    """Refuse what would be read without end, or wait for a writer: a pipe, a socket, a device.

    Raises:
        UserError: the path is not a file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file" + (" but a folder" if path.is_dir() else ", but a pipe or a device"))


def require_place(path: Path) -> None:
    """Refuse a path where no file can be written, before the work whose result it should hold.

    Raises:
        UserError: a folder, a pipe or a device, no permission, or a file among the folders above it.
    """
    require_file(path)
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"{path}: cannot be written; {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written; no permission in {above}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same path, by a lock on the file .NAME.lock beside it.

    Where the system or the file system has no such locks, the block runs without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it replaces `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)  # some writers make files that only their owner may read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove this file's temporary files of processes that no longer run."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        number = left.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdecimal() and not _runs(int(number)):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: no room, no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:
            raise OSError(None, f"cannot be written ({error})", str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)
