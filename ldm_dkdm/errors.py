"""The one family of errors that a user can cause and mend."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile


class Stopped(Exception):
    """A signal ended a run early; all is saved, and the message says how to go on."""


class UserError(ValueError):
    """A mistake in a file, a key or an option; the message names it and says what to do."""


MALFORMED = (
    ArithmeticError,
    AttributeError,
    BadZipFile,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
)  # what content that nobody foresaw raises


@contextmanager
def blaming(source: str | Path, fault: str = "is damaged, or no file of its kind") -> Iterator[None]:
    """Turn what malformed content raises into a `UserError` that names its file."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{source}: {fault} ({type(error).__name__}: {error})") from error


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key whose value is to blame before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point: a `UserError` is one line on stderr and exit code 2, a stop is 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # disk full, no permission
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
