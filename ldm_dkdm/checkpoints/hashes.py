"""Check what is read against the hashes that its writer left: flipped bits, truncated and mixed files."""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.errors import UserError, interruptible, unreadable
from ldm_dkdm.files import SHA256, content_sha256, write_text

BLOCK = 1 << 20  # bytes read at once
ADVICE = "; copy, download or write it again"
DAMAGED = "is damaged: its content does not have the {} that it was written with" + ADVICE
_verify = ContextVar("verify", default=True)


@contextmanager
def verifying(wanted: bool) -> Iterator[None]:
    """Compare hashes within the block, or save the seconds; without an outer block they are compared."""
    before = _verify.set(wanted and _verify.get())
    try:
        yield
    finally:
        _verify.reset(before)


def check_content(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Compare what a safetensors file holds with the SHA-256 in its metadata; other programs' files have none.

    Raises:
        UserError: it differs.
    """
    wanted = (metadata or {}).get(SHA256)
    if wanted is None or not _verify.get():
        return
    with interruptible():
        if content_sha256(tensors, metadata or {}) != wanted:
            raise UserError(f"{path}: {DAMAGED.format('SHA-256')}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, compared with its hash.

    Raises:
        SafetensorError, OSError: it is not one, or cut off.
        UserError: it is damaged.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        metadata = file.metadata() or {}
    check_content(path, tensors, metadata)
    return tensors, metadata


def hash_file(path: Path) -> Path:
    """Where `write_hash` puts a file's SHA-256."""
    return path.with_name(f"{path.name}.sha256")


def write_hash(path: Path, written: Path) -> None:
    """Leave the SHA-256 of a file beside it, as `sha256sum -c` reads it.

    Args:
        path: the name that the file will have. written: the one that it has.
    """
    write_text(hash_file(path), f"{sha256(written)}  {path.name}\n")


def check_file(path: Path) -> None:
    """Compare a file of `torch.save` with the SHA-256 beside it, else with the CRC-32 of its parts.

    Raises:
        UserError: it differs.
        OSError: it cannot be read.
    """
    if not _verify.get():
        return
    beside = hash_file(path)
    if not beside.is_file():
        check_parts(path)
    elif sha256(path) != beside.read_text(errors="replace").partition(" ")[0]:
        raise UserError(f"{path}: {DAMAGED.format('SHA-256')}")


def check_parts(path: Path) -> None:
    """Compare the parts of a zip archive with their CRC-32; a file of another kind has none.

    Raises:
        UserError: one differs, or parts share their content, which no writer does.
    """
    if not _verify.get() or not zipfile.is_zipfile(path):
        return
    with interruptible(), zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.compress_size for part in parts) > path.stat().st_size:
            raise UserError(f"{path}: is damaged: its parts are larger than the file")
        for part in parts:
            _check_part(path, archive, part)


def _check_part(path: Path, archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> None:
    try:
        with archive.open(part) as file:
            while file.read(BLOCK):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise unreadable(path, f"{DAMAGED.format('CRC-32')} ({part.filename})", error) from error
