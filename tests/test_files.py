"""Files that are written whole or not at all, on full disks, through links, beside other writers."""

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ldm_dkdm import UserError
from ldm_dkdm.files import machine, replacing_in, write_tensors, write_text, write_torch
from tests.cli import distil
from tests.test_config_errors import assert_one_error_line
from tests.test_resume import write_config

WEIGHTS = {"a": torch.zeros(30_000)}
WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "a" * 100_000),
    "safetensors": lambda path: write_tensors(path, WEIGHTS),
    "torch": lambda path: write_torch(path, WEIGHTS),
}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 50 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", WRITERS)
def test_where_there_is_no_room_the_file_is_named_and_the_old_one_stays(
    kind: str, tmp_path: Path, full_disk: None
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=str(path)):
        WRITERS[kind](path)
    assert [file.name for file in path.parent.iterdir()] == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_stays_and_what_it_points_to_is_replaced(kind: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    WRITERS[kind](tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").stat().st_size > 50_000


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pipe_a_device_or_a_folder_is_not_replaced(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for place, words in (("pipe", "is not a file, but a pipe"), ("folder", "is not a file but a folder")):
        with pytest.raises(UserError, match=f"{tmp_path / place}: {words}"):
            WRITERS[kind](tmp_path / place)
    with pytest.raises(UserError, match="/dev/null: is not a file"):
        WRITERS[kind](Path("/dev/null"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "pipe"]


def left_behind(folder: Path, writer: str, seconds: float = 0) -> Path:
    """A temporary folder of a writer, last changed some time ago."""
    left = folder / f".file.{writer}.tmp"
    left.mkdir()
    (left / ".tmpAbCdEf").write_bytes(b"half")  # as safetensors writes
    for path in (left / ".tmpAbCdEf", left):
        os.utime(path, (time.time() - seconds, time.time() - seconds))
    return left


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    dead = [left_behind(tmp_path, f"{machine()}-999999999"), left_behind(tmp_path, "0123abcd-1", seconds=100_000)]
    alive = [left_behind(tmp_path, f"{machine()}-{os.getppid()}"), left_behind(tmp_path, "0123abcd-999999999")]
    write_text(tmp_path / "file", "text")
    assert not [left for left in dead if left.exists()] and all(left.exists() for left in alive)


def test_several_files_appear_at_once_or_not_at_all(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), replacing_in(tmp_path, "png") as temporary:
        (temporary / "1.png").write_bytes(b"1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with replacing_in(tmp_path, "png") as temporary:
        for number in "12":
            (temporary / f"{number}.png").write_text(number)
        assert not list(tmp_path.glob("*.png"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_a_run_that_its_disk_cannot_hold_is_refused_before_the_first_call_of_the_teacher(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    base = write_config(teacher_folder, tmp_path, "run")
    usage = shutil.disk_usage(tmp_path)
    room = {"enough": 40_000_000, "too little": 30_000_000}  # a student of 0.7 M parameters takes 38 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room["too little"]))
    words = (f"{tmp_path / 'logs' / 'run'}: the run takes 3", "free on the disk of", "logging.dir", "lower rho")
    assert_one_error_line(capsys, distil("--base", base), words)
    assert not (tmp_path / "logs").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room["enough"]))
    assert distil("--base", base) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room["too little"]))
    assert distil("--base", base) == 0  # it has ended, and takes no more
    written = sum(file.stat().st_size for file in (tmp_path / "logs").rglob("*") if file.is_file())
    assert written < room["enough"]


@pytest.mark.parametrize("library", [False, True])
def test_an_error_that_has_only_a_text_keeps_it(tmp_path: Path, library: bool, monkeypatch) -> None:
    """Image encoders and numpy raise such ones."""

    def fail(*args: object) -> None:
        try:
            raise OSError("100 requested and 50 written")
        except OSError:
            if library:
                raise RuntimeError("unexpected pos")  # noqa: B904  # torch's writer hides the first error so
            raise

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="100 requested and 50 written") as error:
        write_torch(tmp_path / "out.pt", WEIGHTS)
    assert error.value.filename == str(tmp_path / "out.pt")
    assert error.value.strerror == "100 requested and 50 written" and not list(tmp_path.iterdir())
