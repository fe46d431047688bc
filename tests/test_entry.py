"""A process of `dkdm`: any terminal, Ctrl-C in its imports, no memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_dkdm.commands.main import guarded
from ldm_dkdm.errors import LONGEST, UserError, blaming, legible
from tests.cli import ROOT

START = "import sys; sys.argv = ['dkdm', *sys.argv[1:]]; from ldm_dkdm.commands.entry import main; main()"


def started(*arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", before + START, *arguments]
    return subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, **environment}, check=False)


def test_an_ascii_terminal_shows_what_it_can(tmp_path: Path) -> None:
    base = tmp_path / "größe.yaml"
    base.write_text("größe: 1\n")
    done = started("distill", "--base", str(base), PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and done.stderr.startswith(rb"error: gr\xf6\xdfe: unknown key")
    assert len(done.stderr.splitlines()) == 1


def shell(line: str) -> subprocess.CompletedProcess[bytes]:
    whole = f"set -o pipefail; dkdm() {{ '{sys.executable}' -m ldm_dkdm \"$@\"; }}; {line}"
    return subprocess.run(["bash", "-c", whole], capture_output=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("unbuffered", ["", "export PYTHONUNBUFFERED=1; "])
def test_a_reader_that_leaves_costs_nothing(unbuffered: str, teacher_folder: Path, tmp_path: Path) -> None:
    for line, code in (("distill --keys | true", 0), ("nothing 2>&1 | true", 2)):
        done = shell(f"{unbuffered}dkdm {line}")
        assert (done.returncode, done.stderr) == (code, b""), line
    done = shell(f"{unbuffered}dkdm sample -r '{teacher_folder}' -n 1 -c 1 -l '{tmp_path}/out' 2>&1 | true")
    assert done.returncode == 0 and (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_the_work_is_done_where_a_stream_is_closed(closed: str, teacher_folder: Path, tmp_path: Path) -> None:
    done = shell(f"dkdm sample -r '{teacher_folder}' -n 1 -c 1 -l '{tmp_path}/out' {closed}")
    assert done.returncode == 0 and (tmp_path / "out" / "grid.png").is_file()
    assert b"Error" not in done.stderr and (b"out" in done.stdout) == (closed == "2>&-")


@pytest.mark.parametrize("words", [("-m", "ldm_dkdm", "distill", "--base"), ("scripts/dkdm_ldm.py", "--base")])
def test_other_ways_to_a_command(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, *words, "nowhere"], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stderr.startswith(b"error: nowhere: ")


def test_a_working_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = started("inspect", "x", before=f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); ")
    assert (done.returncode, done.stderr) == (2, b"error: the working folder was deleted; change to another one (cd)\n")


def test_ctrl_c_in_an_import_is_no_traceback() -> None:
    press = (
        "import signal, sys\n"
        "class Press:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'omegaconf':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Press())\n"
    )
    done = started("distill", before=press)
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def no_host_memory() -> None:
    import torch

    torch.empty(1 << 60)


def no_numpy_memory() -> None:
    raise MemoryError("Unable to allocate 8.00 EiB for an array")


def no_device_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB")


@pytest.mark.parametrize("work", [no_host_memory, no_numpy_memory, no_device_memory])
def test_out_of_memory_is_one_line_that_names_the_batch_size(work, capsys: pytest.CaptureFixture[str]) -> None:
    def blamed() -> None:
        with blaming("x.pt"):
            work()

    for call in (work, blamed):
        with pytest.raises(SystemExit) as end:
            guarded(call, "lower --batch_size")
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1
        assert lines[0].startswith("error: out of memory (") and lines[0].endswith("; lower --batch_size")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_messages_are_legible() -> None:
    assert legible("größe\tof\n2") == "größe\tof\n2"
    assert legible("\x1b[31m\x00\ud800") == r"\x1b[31m\x00\ud800"
    message = str(UserError("head " + "\x1b" * 10**6 + " tail"))
    assert message.startswith("head ") and message.endswith(" tail") and len(message) < LONGEST + 50
    assert str(UserError(message)) == message
