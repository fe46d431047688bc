"""A disk of its own in a file, whose copy at any moment is what a power cut leaves."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEGABYTES = 96


def _call(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)


def missing() -> str | None:
    """What keeps this machine from mounting a file as a disk; None: it can."""
    if os.geteuid() != 0:
        return "only root mounts disks"
    tools = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if tools:
        return f"{tools[0]} is not installed"
    return None if Path("/dev/loop-control").exists() else "there are no loop devices"


def new_image(path: Path) -> Path:
    """An empty ext4 file system in a file."""
    with path.open("wb") as file:
        file.truncate(MEGABYTES * 1_000_000)
    _call("mkfs.ext4", "-q", path)
    return path


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Mount a file system; its journal is replayed, as after a power cut.

    Raises:
        subprocess.CalledProcessError: this machine does not mount it.
    """
    place.mkdir(exist_ok=True)
    _call("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        _call("umount", place)


def copied(image: Path, to: Path) -> Path:
    """A copy of what is on the disk now, without what the system has yet to write."""
    _call("cp", "--sparse=always", image, to)
    return to
