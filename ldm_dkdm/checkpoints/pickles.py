"""Read pickled files with inert stand-ins: no code that a pickle names is run."""

import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ldm_dkdm.checkpoints.arrays import STAND_INS
from ldm_dkdm.errors import UserError

# What trainings store beside their weights: names of the standard library and of torch that become stand-ins.
# Names outside both always do (Lightning, omegaconf, the user's own code). All others are refused.
HARMLESS = (
    *(f"builtins.{kind}" for kind in ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list")),
    *(f"builtins.{kind}" for kind in ("object", "range", "slice", "str", "tuple")),
    "argparse.Namespace",
    "collections.defaultdict",
    "collections.deque",
    "copyreg._reconstructor",
    "datetime.",
    "decimal.Decimal",
    "enum.",
    "fractions.Fraction",
    "functools.partial",
    "pathlib.",
    "types.MappingProxyType",
    "types.SimpleNamespace",
    "typing.",
    "uuid.",
    "torch._C._nn.",
    "torch.amp.",
    "torch.cuda.amp.",
    "torch.nn.functional.",
    "torch.nn.init.",
    "torch.nn.modules.",
    "torch.optim.",
    "torch.utils.data.",
)
STANDARD = {*sys.stdlib_module_names, *(name.partition(".")[0] for name in IMPORT_MAPPING), "torch"}
DICTIONARIES = re.compile(r"dict|cfgnode|^box$|^counter$", re.IGNORECASE)  # classes whose items a pickle sets


class Inert:
    """Stand-in for a class or function that a pickle names; it does nothing."""

    __slots__ = ()
    stands_for = ""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __new__(cls, *args: object, **kwargs: object) -> "Inert":
        return object.__new__(cls)


def is_zip(path: Path) -> bool:
    """Whether a file begins like torch's zip format; as in `torch.load`, the rest is not examined."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def asked_globals(path: Path) -> set[str]:
    """The classes and functions, `module.name`, that a pickled file names; none is imported.

    Raises:
        UserError: the file is damaged.
    """
    try:
        if is_zip(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
                return {found for name in names for found in _globals_of_member(archive, name)}
        with path.open("rb") as file:
            return set(_globals_of_all(file))
    except Exception as error:  # damage can raise anything; nothing of the file has run
        raise UserError(f"{path}: not a readable checkpoint (is the download complete?): {error}") from error


def _globals_of_member(archive: zipfile.ZipFile, name: str) -> set[str]:
    with archive.open(name) as file:
        return set(_globals_in(file))


def _globals_of_all(file: IO[bytes]) -> Iterator[str]:
    """Globals of the consecutive pickles in PyTorch's legacy format: magic, protocol, system, content, keys."""
    start = file.read(1)
    file.seek(0)
    for _ in range(5):
        if start != b"\x80":
            return
        yield from _globals_in(file)
        start = file.read(1)
        file.seek(-len(start), 1)


def _globals_in(file: IO[bytes]) -> Iterator[str]:
    memo: dict[int, str] = {}
    strings: list[str] = ["", ""]
    nesting = _Nesting()
    argument: Any  # its type depends on the opcode
    for opcode, argument, _ in pickletools.genops(file):
        nesting.follow(opcode, argument)
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = strings[-1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET") and argument in memo:
            strings.append(memo[argument])


class _Nesting:
    """Tracks how deeply the containers of a pickle nest: hashing tuples a million deep would crash the interpreter."""

    LIMIT = 1000
    FAR = 10**6  # largest accepted gap in memo numbers; picklers count one by one
    GROW = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # their first operand stays

    def __init__(self) -> None:
        self.stack: list[int] = []  # depth of every object; -1 is a mark
        self.memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Apply the effect of an opcode, as pickletools describes it."""
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(self.memo) if argument is None else argument
            if place > self.FAR + 2 * len(self.memo):
                raise pickle.UnpicklingError(f"it numbers its objects up to {place}, which takes memory for nothing")
            self.memo[place] = self.stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode.name == "MARK":
            self.stack.append(-1)
        elif opcode.name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            taken = self._take(opcode)
            depth = 1 + max(taken, default=-1)
            if opcode.name in self.GROW:
                depth = max(taken[0], 1 + max(taken[1:], default=-1))
            if depth > self.LIMIT:
                raise pickle.UnpicklingError(f"its content is nested more than {self.LIMIT} deep")
            self.stack += [depth] * len(opcode.stack_after)

    def _take(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """Depths of the operands that an opcode takes off the stack."""
        taken: list[int] = []
        before = list(opcode.stack_before)
        if pickletools.markobject in before:
            while (top := self.stack.pop()) != -1:
                taken.append(top)
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            taken.append(self.stack.pop())
        return taken[::-1]


def refused_globals(names: set[str]) -> list[str]:
    """The names that belong neither to tensors nor to known harmless classes."""
    return sorted(name for name in names if not (_is_stubbed(name) or _is_torch(name) or name in STAND_INS))


def _is_torch(name: str) -> bool:
    harmless = ("torch.", "collections.OrderedDict", "collections.Counter", "_codecs.encode")
    return name.startswith(harmless) or name in ("builtins.set", "__builtin__.set")


def _is_stubbed(name: str) -> bool:
    """Whether a name becomes a stand-in, by the name that Python 3 has for it."""
    name = modern_name(name)
    if name.partition(".")[0] in STANDARD:
        return any(name.startswith(known) if known.endswith(".") else name == known for known in HARMLESS)
    return name not in STAND_INS


def modern_name(name: str) -> str:
    """Python 3's name of a class or function, which pickles of protocol 2 store under Python 2's."""
    module, _, kind = name.rpartition(".")
    module, kind = NAME_MAPPING.get((module, kind), (IMPORT_MAPPING.get(module, module), kind))
    return f"{module}.{kind}"


def read_torch_file(path: Path) -> Any:
    """Read a file of `torch.save`, zip or legacy, memory-mapped where possible.

    Raises:
        UserError: a damaged file, or one that names any of `refused_globals`.
    """
    asked = asked_globals(path)
    refused = refused_globals(asked)
    if refused:
        raise UserError(
            f"{path}: refused, its pickle asks for {', '.join(refused[:8])}, which no weights need; nothing was run; "
            "if you trust it, save its weights alone: torch.save(model.state_dict(), FILE)"
        )
    stubs: list[Any] = [(_stub(name), modern_name(name)) for name in asked if _is_stubbed(name)]
    arrays: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stubs + arrays):
            warnings.simplefilter("ignore")  # the error below says it in one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_cause(error)}") from error
    except Exception as error:  # a damaged pickle can raise anything; nothing of it has run
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable checkpoint (is the download complete?): {first}") from error


def _cause(error: pickle.UnpicklingError) -> str:
    """The cause, without torch's advice to trust the file."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"it holds an object of {asked[1]}, whose code would have to run; save its state_dict() instead"
    if "persistent_load" in str(error):  # the legacy format stores a module's source
        return "it holds a network with its source; save its state_dict() instead"
    lines = str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines() or ["its pickle cannot be read"]
    return f"the file is damaged or asks to run code: {lines[0].split('Please use')[0].strip()}"


def _stub(name: str) -> Callable[..., object]:
    """A stand-in of its own for every name, so that a message can say what it stands for."""
    last = name.rpartition(".")[2]
    if name == "collections.deque":
        return _empty_list
    if DICTIONARIES.search(last) and name != "builtins.dict":
        return type(last, (_Dictionary,), {})
    return type(last, (Inert,), {"__slots__": (), "stands_for": name})


class _Dictionary:
    """Stand-in for a class derived from dict, such as a defaultdict: its items, in a dictionary without its methods."""

    def __new__(cls, *args: object) -> OrderedDict[object, object]:  # type: ignore[misc]  # torch fills no other class
        return OrderedDict()


def _empty_list(*args: object) -> list[object]:
    """Stand-in for a deque."""
    return []


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes as the oldest protocols write them."""
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays in plain containers; refuses all other classes."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for the constructor that the pickle names."""
        if (module, name) == ("collections", "defaultdict"):
            return defaultdict
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if f"{module}.{name}" not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return STAND_INS[f"{module}.{name}"]


def read_array_pickle(path: Path) -> Any:
    """Read a plain pickle of arrays in dictionaries, lists and numbers, such as a reference pool cache.

    Raises:
        UserError: a damaged file, or one that asks for anything but arrays.
    """
    try:
        with path.open("rb") as file:
            set(_globals_in(file))  # refuses what is nested too deeply
            file.seek(0)
            return _ArrayUnpickler(file).load()
    except Exception as error:  # damage can raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: refused, not a readable pickle of arrays: {first}") from error
