"""Where a process of `dkdm` or of a script begins: Ctrl-C is quiet from the first import on."""

import sys


def main(command: str | None = None) -> None:
    """Run the process's command line, as `commands.main.main` does, and exit."""
    try:
        for stream in (sys.stdout, sys.stderr):  # an ASCII terminal, or a name that is not UTF-8
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        from ldm_dkdm.commands.main import main as run

        run(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
