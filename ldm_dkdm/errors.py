"""`UserError`, `Stopped`, and helpers for their messages."""

import difflib
import errno
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, TypeVar
from zipfile import BadZipFile

T = TypeVar("T")
LONGEST = 2000  # characters of a message; names come from files, and files are not trusted
GUESSED = 100  # longest name for which a near one is looked for: comparing takes the square of the length


class Stopped(Exception):
    """A signal ended a run early; all is saved, and the message says how to continue."""


class UserError(ValueError):
    """A mistake in a file, a key or an option; the message names it and says what to do.

    Its text is `legible`, whatever names it quotes.
    """

    def __init__(self, message: object) -> None:
        super().__init__(legible(str(message)))


class OtherRun(UserError):
    """A config of another kind of run than is asked for, for a caller from Python.

    Attributes:
        of_command, of_script: the message for the command line, of `dkdm` or of a script.
    """

    def __init__(self, files: str, found: Any, expected: Any) -> None:
        kind = found.__name__
        super().__init__(f"{files}: is a {kind}, not a {expected.__name__}; load_config(FILE, schema={kind}) reads it")
        self.of_command = f"{files}: made for dkdm {found.COMMAND}, not for dkdm {expected.COMMAND}"
        self.of_script = f"{files}: made for scripts/{found.SCRIPT}, not for {expected.SCRIPT}"


def legible(text: str, most: int = LONGEST) -> str:
    """A text for a terminal: control characters are escaped, the middle of one above `most` characters is left out."""
    text = _shortened(text, most)
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return _shortened("".join(escaped), most)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head, tail = text[: most * 3 // 4], text[len(text) - most // 5 :]
    return f"{head} ... ({len(text) - len(head) - len(tail)} characters) ... {tail}"


def pick(table: Mapping[str, T], name: object, parameter: str) -> T:
    """The entry of a table.

    Raises:
        UserError: the table has no such name; the message names the parameter and lists the names.
    """
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{parameter}: {name!r} is not one of {', '.join(table)}{closest(str(name), table)}")
    return table[name]


def near(name: str, valid: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The nearest valid name, if one is near."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff) if len(name) <= GUESSED else []


def closest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid name, if one is near."""
    close = near(name, valid)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest(key: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid key, or all of them."""
    names = list(valid)
    close = near(key, names, cutoff=0.5)
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
def interruptible() -> Iterator[None]:
    """Let Ctrl-C leave as KeyboardInterrupt: C code can turn it into another error, or swallow it.

    A `Stopped` passes: what it says is saved.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    raised: list[BaseException] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        try:
            before(number, frame)
        except BaseException as interrupt:
            raised.append(interrupt)
            raise

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if raised:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if raised:
        raise KeyboardInterrupt


NO_MEMORY = re.compile(
    "out of memory|not enough memory|allocate memory|buffer size|(calculation|multiplication) overflow"
)


IMPOSSIBLE = re.compile("buffer size|overflow")  # numbers that no memory holds: those of a file are damage
ASKED = re.compile(r"tried to allocate [\d.]+ ?\w+")


class OutOfMemory(UserError, MemoryError):
    """There is not the memory to read a file, which may be whole."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library could not get the memory that it asked for, on the host or on a device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    kind = type(error).__name__
    return isinstance(error, MemoryError) or (
        (isinstance(error, RuntimeError) or kind == "SafetensorError")
        and NO_MEMORY.search(str(error).lower()) is not None
    )


def lacks_memory(error: BaseException) -> bool:
    """Whether a reader could not get the memory for a file that may be whole."""
    return is_out_of_memory(error) and IMPOSSIBLE.search(str(error).lower()) is None


def memory_asked(error: BaseException) -> str:
    """How much memory there was not, as a library's error says it."""
    if found := ASKED.search(str(error).lower()):
        return found[0]
    return legible((str(error).strip().splitlines() or ["no more is free"])[0].partition(". ")[0], 200)


def unreadable(path: str | Path, fault: str, error: BaseException) -> UserError:
    """The error of a reader that failed: the file's fault, or `OutOfMemory`, which does not blame the file."""
    if lacks_memory(error):
        return OutOfMemory(f"{path}: out of memory while it is read ({memory_asked(error)})")
    return UserError(f"{path}: {fault}")


@contextmanager
def blaming(source: str | Path, fault: str = "is damaged, or not a file of its kind") -> Iterator[None]:
    """Turn what malformed content raises into a `UserError` that names its file; Ctrl-C is not damage."""
    try:
        with interruptible():
            yield
    except UserError:
        raise
    except MALFORMED as error:
        if lacks_memory(error):
            raise
        raise UserError(f"{source}: {fault} ({type(error).__name__}: {error})") from error


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Prefix the message of a `UserError` with the key at fault."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error}") from error
