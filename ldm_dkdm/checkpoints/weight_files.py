"""Choose the weights file of a folder, by one rule; list the shards behind an index."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ldm_dkdm.checkpoints.ema_names import said_of
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import JSON_BYTES, exists, read_text

STEM = "diffusion_pytorch_model"  # name in diffusers' folders
STANDARD = [f"{STEM}.{kind}" for kind in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")]
OTHERS = ("*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.ckpt")  # variants and renamed files, in order of preference
NOT_WEIGHTS = ("optimizer", "scheduler", "random_states", "training_args", "scaler", "sampler")  # trainer files
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
INDEX = re.compile(r"\.index(\.\w+)?\.json$")


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name."""
    return INDEX.search(path.name) is not None


def refuse_shard(path: Path) -> None:
    """Refuse one of several shards, by its name, since the others hold the rest of the network.

    Raises:
        UserError: names the index, or says that it is missing.
    """
    found = SHARD.search(path.name)
    if found is None or found[0] == "-00001-of-00001.":
        return
    stem = path.name[: found.start()]
    index = next((file.name for file in sorted(path.parent.glob(f"{stem}.*.json")) if is_index(file)), None)
    advice = f"name their index, {path.parent / index}" if index else f"their index ({stem}.*.index.json) is missing"
    raise UserError(f"{path}: is one of several shards; {advice}")


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, or the index of its shards.

    diffusers' order: safetensors before .bin, whole files before shards, the plain file before variants such as fp16;
    then the only file that is left, non-EMA weights last.

    Raises:
        UserError: no weights file, or several.
    """
    for name in STANDARD:
        if (folder / name).is_file():
            return folder / name
    for pattern in OTHERS:
        found = [path for path in sorted(folder.glob(pattern)) if _may_be_weights(path)]
        ema = [path for path in found if said_of(path.name) is not False] or found
        if len(ema) > 1:
            raise UserError(f"{folder}: holds several weight files ({ema[0].name}, {ema[1].name}); name one of them")
        if ema:
            return ema[0]
    raise UserError(f"{folder}: {_why_none(folder)}")


def holds_weights(folder: Path, others: Collection[str] = ()) -> bool:
    """Whether a folder holds any weights file but those named `others`."""
    return any(True for _ in all_weights(folder, others))


def all_weights(folder: Path, others: Collection[str] = ()) -> Iterator[Path]:
    """The weights files of a folder but those named `others`."""
    found = (path for pattern in OTHERS for path in sorted(folder.glob(pattern)) if path.name not in others)
    return filter(_may_be_weights, found)


def _may_be_weights(path: Path) -> bool:
    """Whether a file is neither one of several shards nor a trainer's other state."""
    other = path.name.startswith(NOT_WEIGHTS) or (path.suffix == ".json" and not is_index(path))
    return path.is_file() and not SHARD.search(path.name) and not other


def _why_none(folder: Path) -> str:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [path.name for path in files]
    broken = next((path for path in files if path.is_symlink() and not path.exists()), None)
    if broken:
        return f"{broken.name} is a link to {broken.readlink()}, which is missing; download it again"
    shards = [name for name in names if SHARD.search(name)]
    if shards:
        return f"holds shards ({shards[0]}, ...) without their index ({SHARD.split(shards[0])[0]}.*.index.json)"
    flax = next((name for name in names if name.endswith(".msgpack")), None)
    if flax:
        return f"holds Flax weights only ({flax}); save them for PyTorch"
    return "no such checkpoint file, and the folder holds no weights"


def files_of(path: Path) -> list[Path]:
    """The file itself, or the shards that an index lists, each once, in the order of their names.

    Raises:
        UserError: a malformed index, or a shard that is missing.
    """
    if not is_index(path):
        return [path]
    return [path.parent / name for name in sorted(set(shards_of(path).values()))]


def shards_of(path: Path) -> dict[str, str]:
    """The file's name of each tensor that an index lists.

    Raises:
        UserError: a malformed index, or a shard that is missing.
    """
    try:
        listed = json.loads(read_text(path, JSON_BYTES))["weight_map"]
        names = sorted(set(listed.values()))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable index of shards: {type(error).__name__}: {error}") from error
    _require_shards(path, names)
    return listed


def _require_shards(path: Path, names: Iterable[object]) -> None:
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{path}: weight_map: {name!r} must be a file name in the same folder")
        if not exists(str(path.parent / name)):
            raise UserError(f"{path.parent / name}: missing; {path.name} lists it")
