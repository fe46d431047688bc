"""Read pools: those of runs of this package, and caches of the reference implementation."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_dkdm.checkpoints.arrays import PickledArray
from ldm_dkdm.checkpoints.hashes import read_safetensors
from ldm_dkdm.checkpoints.reading import AGAIN, as_tensor, file_kind, read_content
from ldm_dkdm.config.process_section import ONCE_UNSAID
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.errors import MALFORMED, UserError, blaming, unreadable
from ldm_dkdm.records import NoisyBatch

STEPS, STATES = "total_t", "total_x_t_1"
WARMUP = "warmup"  # begins the names of the pools before the first checkpoint
LATER = ("weights_kind", "null_label")  # facts that pools of older versions do not say
IN_CHECKPOINT = "dynamic_batch"  # key of the cache in the reference's latent checkpoints


_NAME = re.compile(r"(step=\d+|warmup)\.pool-rank\d+\.safetensors")


def is_own_pool(path: Path) -> bool:
    """Whether a path is a run folder, or a pool file in one."""
    return path.is_dir() or _NAME.fullmatch(path.name) is not None


def pool_header(file: Path) -> dict[str, Any]:
    """What a pool's file says of its states, without reading them.

    Raises:
        UserError: not a pool file of this package.
    """
    file_kind(file)  # refuses a header without end
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})["pool"])
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise unreadable(file, f"not a readable pool file ({error})", error) from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a readable pool file")
    return header


def read_own_pool(path: Path, shape: tuple[int, int, int], facts: Mapping[str, Any]) -> NoisyBatch:
    """States (N,C,H,W), timesteps (N,) and labels (N,) of a run's newest pools, of all ranks together, or of one file.

    Raises:
        UserError: no pool there, one that is not full, or one of another teacher, T or schedule than `facts`.
    """
    parts = [_read_own(file, shape, facts) for file in ([path] if path.is_file() else _newest(path))]
    if len({part.label is None for part in parts}) > 1:
        raise UserError(f"{path}: only some of its pools have labels")
    labels = [part.label for part in parts if part.label is not None]
    x, t = torch.cat([part.x for part in parts]), torch.cat([part.t for part in parts])
    return NoisyBatch(x, t, torch.cat(labels) if labels else None)


def _newest(run: Path) -> list[Path]:
    """The pools of a run's newest checkpoint, or of its warm-up before the first checkpoint."""
    folder = run / "checkpoints"
    steps = sorted({file.stem for file in folder.glob("step=*.ckpt")})
    for stem in [*reversed(steps), WARMUP]:
        if (folder / f"{stem}.pool-rank0.safetensors").is_file():
            return pool_files(folder, stem)
    raise UserError(f"{run}: is not the run folder of a distillation with a pool (checkpoints/step=N.pool-rank0...)")


def pool_files(folder: Path, stem: str) -> list[Path]:
    """The pools of one save, in the order of the ranks that made it; files of other ranks beside them are left out.

    Args:
        folder: checkpoints/ of a run.
        stem: `step=N` or `warmup`.

    Raises:
        UserError: one is missing, or the first is damaged.
    """
    files = {int(file.suffixes[-2].removeprefix(".pool-rank")): file for file in folder.glob(f"{stem}.pool-rank*")}
    first = folder / f"{stem}.pool-rank0.safetensors"
    count = _ranks(first, len(files)) if first.is_file() else max(files, default=0) + 1
    if stem == WARMUP:  # further ranks may have joined
        count = max(count, max(files, default=0) + 1)
    for rank in range(count):
        if rank not in files:
            lacking = folder / f"{stem}.pool-rank{rank}.safetensors"
            raise UserError(f"{lacking}: missing; the checkpoint beside it cannot be resumed without its pool")
    return [files[rank] for rank in range(count)]


def _ranks(file: Path, default: int) -> int:
    """How many ranks saved a pool together; a file of an older version does not say it."""
    try:
        if file_kind(file) != "safetensors":
            raise ValueError("another format")
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})["pool"])
        return int(header.get("ranks", default))
    except (SafetensorError, OSError, *MALFORMED) as error:
        reason = str(error).removeprefix(f"{file}: ").removesuffix(AGAIN)
        renew = "; delete it to start a new pool" if file.name.startswith(WARMUP) else ""
        raise unreadable(file, f"not a readable pool file ({reason}){renew}", error) from error


def _read_own(file: Path, shape: tuple[int, int, int], facts: Mapping[str, Any]) -> NoisyBatch:
    if file_kind(file) != "safetensors":
        raise UserError(f"{file}: not a readable pool file")
    try:
        tensors, metadata = read_safetensors(file)
        header = json.loads(metadata["pool"])
        x, t, label = tensors["x"], tensors["t"].long(), tensors.get("label")
        filled = int(header["filled"])
        known = {name for name in facts if name in header}
    except UserError:
        raise
    except (SafetensorError, OSError, *MALFORMED) as error:
        raise unreadable(file, f"not a readable pool file ({error})", error) from error
    for name, wanted in json.loads(json.dumps(facts)).items():
        if name not in known and name in LATER:
            continue
        if name not in known:
            raise UserError(f"{file}: does not say its {name}; only pools saved by this version can be reused")
        if _completed(header[name]) != wanted:
            raise UserError(f"{file}: its {name} is {header[name]}, this run's is {wanted}")
    if filled < len(t):
        raise UserError(f"{file}: its warm-up was interrupted at slot {filled} of {len(t)}; finish that run")
    if not len(t) or x.shape != (len(t), *shape) or not 0 <= int(t.min()) <= int(t.max()) < facts["num_timesteps"]:
        raise UserError(f"{file}: states {tuple(x.shape)} or timesteps that do not fit the teacher's {shape}")
    return NoisyBatch(x, t, None if label is None else label.long())


def other_facts(header: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value in a pool's header, value in `facts`) of what differs; what the header does not say is passed over.

    Of a forward process the keys that differ are named, as diffusion.KEY.
    """
    for name, now in json.loads(json.dumps(facts)).items():
        before = _completed(header.get(name, now))
        if isinstance(before, dict) and isinstance(now, dict):
            named = {f"{name}.{key}": (value, now.get(key)) for key, value in before.items()}
            # Older versions did not say these:
            unsaid = {f"{name}.{key}" for key in ONCE_UNSAID if before.get(key) is None}
            yield from ((key, *pair) for key, pair in named.items() if pair[0] != pair[1] and key not in unsaid)
        elif before is not None and before != now:
            yield name, before, now


def _completed(fact: Any) -> Any:
    """A fact of a pool's header; a forward process has the defaults of keys that are newer than the file, or unused."""
    if not isinstance(fact, dict):
        return fact
    found = {**asdict(DiffusionConfig()), **fact}
    if found["schedule"] == "cosine":
        ends = DiffusionConfig("cosine")
        found |= {"beta_start": ends.beta_start, "beta_end": ends.beta_end}
    return found


def read_reference_pool(path: Path, shape: tuple[int, int, int], num_timesteps: int) -> NoisyBatch:
    """States (N,C,H,W) and timesteps (N,) of a cache; -1 marks a finished slot.

    The reference counts the steps that remain, T for noise and 0 for finished; the timestep that the teacher
    sees next is one less.

    Raises:
        UserError: another kind of file, states of another shape, or steps above T.
    """
    with blaming(path):
        return _read(path, shape, num_timesteps)


def _read(path: Path, shape: tuple[int, int, int], num_timesteps: int) -> NoisyBatch:
    content = read_content(path)
    cache = content.get(IN_CHECKPOINT, content) if isinstance(content, Mapping) else content
    if not (isinstance(cache, Mapping) and STEPS in cache and STATES in cache):
        raise UserError(f"{path}: holds no pool of the reference implementation ({STEPS} and {STATES})")
    steps, states = _tensor(cache[STEPS], STEPS, path), _tensor(cache[STATES], STATES, path)
    if steps.ndim != 1 or steps.is_floating_point():
        raise UserError(f"{path}: {STEPS} is {steps.dtype} {tuple(steps.shape)}, expected one integer per state")
    if states.shape != (len(steps), *shape):
        raise UserError(
            f"{path}: states {tuple(states.shape)} with steps {tuple(steps.shape)}; the teacher's are {shape}"
        )
    if len(steps) == 0 or steps.min() < 0 or steps.max() > num_timesteps:
        raise UserError(f"{path}: its steps are outside 0 ... {num_timesteps}, the teacher's range")
    if not torch.isfinite(states.half()).all():
        raise UserError(f"{path}: holds states that are not finite, in half precision; the file is damaged")
    return NoisyBatch(states.float(), steps.long() - 1, None)


def _tensor(value: object, name: str, path: Path) -> Tensor:
    if isinstance(value, (Tensor, PickledArray)):
        numbers = as_tensor(value, name, path)
        if not (numbers.is_complex() or numbers.dtype == torch.bool):
            return numbers
    raise UserError(f"{path}: {name} is not an array of numbers")
