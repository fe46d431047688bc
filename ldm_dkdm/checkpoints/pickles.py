"""Read pickled files with inert stand-ins: no code that a pickle names is run."""

import pickle
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm_dkdm.checkpoints.arrays import STAND_INS
from ldm_dkdm.checkpoints.hashes import check_parts
from ldm_dkdm.checkpoints.pickle_shape import PickleShape
from ldm_dkdm.errors import UserError, unreadable

TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save's legacy files
QUESTION = " (is the download complete?)"
INCOMPLETE = f"not a readable checkpoint{QUESTION}"
PROTO = 0x80  # begins a pickle of protocol 2 or above; the protocol follows
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what that pickle holds, in any protocol
SAVE = "torch.save(model.state_dict(), FILE)"
PERSISTENCE = "torch_utils.persistence."  # NVIDIA's module that pickles networks with their source
LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages

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
        UserError: the file is damaged, or unpickling it would take more than weights do (`pickle_shape`).
    """
    shape = PickleShape()
    try:
        if is_zip(path):
            with zipfile.ZipFile(path) as archive, archive.open(_pickle_in(archive)) as file:
                shape.read(file)
        else:
            with path.open("rb") as file:
                legacy = file.read(len(TORCH_MAGIC)) == TORCH_MAGIC
                file.seek(0)
                for _ in range(LEGACY_PICKLES if legacy else 1):
                    shape.read(file)
    except Exception as error:  # damage can raise anything; nothing of the file has run
        raise unreadable(path, f"{INCOMPLETE}: {error}", error) from error
    return shape.names


def _pickle_in(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The one pickle in a file of torch's zip format, which stores it as it is.

    Raises:
        ValueError: there is none, or several, or it is compressed.
    """
    found = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} pickles called data.pkl in place of one")
    if found[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("its pickle is compressed, unlike those of torch.save")
    return found[0]


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
            f"if you trust it, save its weights alone: {SAVE}"
        )
    check_parts(path)
    stubs: list[Any] = [(_stub(name), modern_name(name)) for name in asked if _is_stubbed(name)]
    arrays: list[Any] = [(stand_in, name) for name, stand_in in STAND_INS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stubs + arrays):
            warnings.simplefilter("ignore")  # the error below says it in one line
            return _loaded(path)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_cause(error, _protocol(path))}") from error
    except Exception as error:  # a damaged pickle can raise anything; nothing of it has run
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise unreadable(path, f"{INCOMPLETE}: {first}", error) from error


def _loaded(path: Path) -> Any:
    """The content by `torch.load`, which reads a file whose name ends in .safetensors as safetensors unless it is open.

    Such a file is not memory-mapped, since an open one cannot be.
    """
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _protocol(path: Path) -> int:
    """The protocol of the file's pickle of content; 0 where it has none, as the oldest."""
    with zipfile.ZipFile(path) if is_zip(path) else path.open("rb") as opened:
        head = opened.open(_pickle_in(opened)).read(2) if isinstance(opened, zipfile.ZipFile) else opened.read(2)
    return head[1] if len(head) == 2 and head[0] == PROTO else 0


def _cause(error: pickle.UnpicklingError, protocol: int) -> str:
    """The cause, without torch's advice to trust the file."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"it holds an object of {asked[1]}, whose code would have to run; save its state_dict() instead"
    if "persistent_load" in str(error):  # the legacy format stores a module's source
        return "it holds a network with its source; save its state_dict() instead"
    if "Unsupported operand" in str(error) and protocol > 2:
        return f"its pickle has protocol {protocol}, and only torch.save's default, 2, is read; save it again: {SAVE}"
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
        UserError: a damaged file, one that asks for anything but arrays, or one of torch.save in another protocol.
    """
    try:
        with path.open("rb") as file:
            (shape := PickleShape()).read(file)  # refuses what takes more than arrays do
            _refuse_networks(shape.names, path)
            file.seek(0)
            content = _ArrayUnpickler(file).load()
    except UserError:
        raise
    except Exception as error:  # damage can raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise unreadable(path, f"refused, not a readable pickle of arrays: {first}", error) from error
    if content == LEGACY_MAGIC:
        raise UserError(
            f"{path}: refused, it is a file of torch.save in its legacy format with pickle protocol {_protocol(path)}, "
            f"and only the default, 2, is read; save it again: {SAVE}"
        )
    return content


def _refuse_networks(names: set[str], path: Path) -> None:
    """Refuse tensors of PyTorch, and a network of NVIDIA's EDM or StyleGAN code, which is pickled with its source."""
    if any(name.startswith(PERSISTENCE) for name in names):
        raise UserError(
            f"{path}: refused, it is a network of NVIDIA's EDM or StyleGAN code with its source (it asks for "
            f"{PERSISTENCE[:-1]}), which would have to run; EDM's process over sigmas is not supported either: name a "
            "model of a discrete DDPM process"
        )
    if any(name.startswith("torch.") for name in names):
        raise UserError(
            f"{path}: refused, it holds PyTorch's tensors, pickled without torch.save; write it with {SAVE}"
        )
