"""Paths as users write them, and files that are written whole or not at all."""

import errno
import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import time
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
NAME = 150  # characters of a file's name in that of its temporary folder; a file system takes 255 bytes
SHA256 = "sha256"  # key of `content_sha256` in the metadata of a safetensors file
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, None)  # errors of a disk; None: unsaid
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # the name is another writer's by now
ABANDONED = 86_400.0  # seconds after which another machine's temporary files are no longer being written


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


def require_place(path: Path, folder: bool = False) -> None:
    """Refuse a path where no file, or no `folder` of files, can be written, before the work that it is for.

    Raises:
        UserError: a folder (a file, for a `folder`), a pipe or a device, no permission, a file among the folders above.
    """
    if not folder:
        require_file(path)
    places = path.absolute() if folder or not path.is_symlink() else path.resolve()
    above = next(place for place in ([places] if folder else []) + [*places.parents] if os.path.lexists(place))
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
    lock = path.with_name(f".{path.name}.lock")
    require_file(lock)
    with lock.open("a") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name on the disk of `path`; the file of that name replaces `path` when the block succeeds.

    A link stays: what it points to is replaced.

    Raises:
        UserError: `path` is a folder, a pipe or a device.
        OSError: no room, no permission.
    """
    place = path.resolve() if path.is_symlink() else path
    require_file(place)
    with replacing_in(place.parent, place.name) as folder:
        yield folder / place.name


@contextmanager
def replacing_in(folder: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`; what is in it moves to `folder` when the block succeeds.

    Files are on the disk before they have their names, and the names are on the disk before this returns: after a power
    cut a file is the old one or the new one. Temporary folders of writers that were killed are removed.

    Args:
        folder: made if it is missing.
        name: of the file, or of the kind of files; the temporary folder's name begins with it.

    Raises:
        OSError: no room, no permission; it names `folder / name`.
    """
    make_folder(folder)
    start = f".{name[:NAME]}."
    for left in folder.glob(f"{glob.escape(start)}*.tmp"):
        remove_abandoned(left)
    temporary = folder / f"{start}{writer()}.tmp"
    try:
        temporary.mkdir(exist_ok=True)
        yield temporary
        _move(temporary, folder)
    except OSError as error:
        if error.errno in (*DISK, *TAKEN) and str(error.filename or temporary).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror or str(error), str(folder / name)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Move finished files, or folders whose files are synced, and wait until all is on the disk."""
    found = sorted(temporary.iterdir())
    for path in found:
        if path.is_file():
            path.chmod(0o644)  # some writers make files that only their owner may read
        sync(path)
    for path in found:
        path.replace(folder / path.name)
    sync(folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk (fsync)."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:  # a file system that cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(opened)


@functools.cache
def machine() -> str:
    """Eight digits that tell the numbers of this machine's or container's processes from those of others."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    facts = [
        platform.node(),
        boot.read_text() if boot.is_file() else "",
        str(space.readlink()) if space.exists() else "",
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:8]


def writer() -> str:
    """This process, as names of temporary files and folders give it."""
    return f"{machine()}-{os.getpid()}"


def remove_abandoned(left: Path) -> None:
    """Remove a temporary file or folder whose writer no longer runs.

    Whether a process of another machine or container runs is unknown here: its files go a day after their last change.
    """
    where, _, number = left.name.removesuffix(".tmp").rpartition(".")[2].partition("-")
    own = where == machine() and number.isdecimal()
    try:
        if _runs(int(number)) if own else time.time() - _last_change(left) < ABANDONED:
            return
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    except OSError:  # another process removed it, or may
        return


def _last_change(path: Path) -> float:
    return max(file.lstat().st_mtime for file in (path, *path.glob("*")))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, with the SHA-256 of its content in its metadata.

    Raises:
        OSError: no room, no permission.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    facts = dict(metadata or {})
    facts[SHA256] = content_sha256(tensors, facts)
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, facts)
            _sort_metadata(temporary)
        except SafetensorError as error:
            raise _disk_error(error, path) from error


def _sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata in the order of its keys: safetensors' is another one in every process."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:  # the tensors stay where they are
            opened.seek(8)
            opened.write(text)


def content_sha256(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> str:
    """SHA-256 of what a safetensors file holds: its other metadata, and every tensor's name, type, shape and bytes."""
    import torch

    digest = hashlib.sha256(repr(sorted((k, v) for k, v in metadata.items() if k != SHA256)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_torch(path: Path, content: object) -> None:
    """Write a file of `torch.save` atomically, on the disk where it goes.

    Raises:
        OSError: no room, no permission.
    """
    import torch

    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # its writer hides what the disk said
            raise _disk_error(error, path) from error


def _disk_error(error: Exception, path: Path) -> OSError:
    """What kept a library from writing a file."""
    if isinstance(error.__context__, OSError):
        hidden = error.__context__
        return OSError(hidden.errno, hidden.strerror or str(hidden), str(path))
    return OSError(None, f"cannot be written ({error})", str(path))


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)
