"""Where a process of `dkdm` or of a script begins: its streams, and a quiet Ctrl-C from the first import on."""

import io
import os
import sys
from pathlib import Path
from typing import Any


def main(command: str | None = None) -> None:
    """Run the process's command line, as `commands.main.main` does, and exit."""
    try:
        _open_streams()
        _require_folder()
        from ldm_dkdm.commands.main import main as run

        run(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _require_folder() -> None:
    """End where the working folder was deleted: torch's libraries do not load there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        print("error: the working folder was deleted; change to another one (cd)", file=sys.stderr)
        sys.exit(2)


def _open_streams() -> None:
    """Make stdout and stderr safe to write to: closed ones (`2>&-`) and those that a reader leaves lose their lines."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        try:
            os.fstat(number)
        except OSError:  # a file that is opened later would have the number, and get what libraries write there
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # a caller's own
        raw = _Output(number, "wb", closefd=False)
        unbuffered = stream is not None and stream.write_through  # PYTHONUNBUFFERED
        opened = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            stream.encoding if stream else "utf-8",
            "backslashreplace",  # an ASCII terminal, or a name that is not UTF-8
            line_buffering=stream is not None and stream.line_buffering,
            write_through=unbuffered,
        )
        setattr(sys, name, opened)


class _Output(io.FileIO):
    """The raw end of a stream whose reader may leave (`| head`): the rest goes to the null device."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)
