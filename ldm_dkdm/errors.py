"""`UserError`, `Stopped`, and helpers for their messages."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar
from zipfile import BadZipFile

T = TypeVar("T")


class Stopped(Exception):
    """A signal ended a run early; all is saved, and the message says how to continue."""


class UserError(ValueError):
    """A mistake in a file, a key or an option; the message names it and says what to do."""


def pick(table: Mapping[str, T], name: object, parameter: str) -> T:
    """The entry of a table.

    Raises:
        UserError: the table has no such name; the message names the parameter and lists the names.
    """
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{parameter}: {name!r} is not one of {', '.join(table)}{closest(str(name), table)}")
    return table[name]


def closest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid name, if one is near."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest(key: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid key, or all of them."""
    names = list(valid)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid keys: {', '.join(names)}"


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
)  # raised by malformed content


@contextmanager
def blaming(source: str | Path, fault: str = "is damaged, or not a file of its kind") -> Iterator[None]:
    """Turn what malformed content raises into a `UserError` that names its file."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{source}: {fault} ({type(error).__name__}: {error})") from error


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Prefix the message of a `UserError` with the key at fault."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
