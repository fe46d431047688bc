"""Check that a run has the memory and the disk that it takes, before its first step and before anything is written."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ldm_dkdm.config.schema import LoggingConfig, TrainerConfig
from ldm_dkdm.device import default_device
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import require_place
from ldm_dkdm.reporting import size
from ldm_dkdm.training.parts import Distillation
from ldm_dkdm.training.run_folder import RunFolder
from ldm_dkdm.training.saving import KEPT

CHECKPOINT = 16  # bytes a parameter: weights, their average, Adam's two moments
MODEL = 4  # bytes a parameter


def disk_needed(parameters: int, trainer: TrainerConfig, log: LoggingConfig, pool: int = 0, mapped: int = 0) -> int:
    """Bytes that a whole run takes on its disk, the next checkpoint and model included while they are written.

    Args:
        parameters: of the model. trainer, log: of the run.
        pool: bytes of all ranks' pools. mapped: of those that are mapped to files.
    """
    forever = (trainer.max_steps // log.keep_every if log.keep_every else 0) + log.keep_best
    return (
        (KEPT + 1) * (pool + CHECKPOINT * parameters)
        + 2 * MODEL * parameters
        + mapped
        + forever * (CHECKPOINT * parameters)
    )


def require_disk(folder: RunFolder, needed: int, lower: str = "the model's width") -> None:
    """Refuse a run whose folder cannot be written, or whose disk cannot hold it; what it has written already counts.

    Args:
        folder: logs/<run>. needed: bytes of the whole run.
        lower: what would make it smaller.

    Raises:
        UserError: names the folder, or the disk.
    """
    try:
        require_place(folder.path, folder=True)
    except UserError as error:
        raise UserError(f"{error}; name another folder (logging.dir, in Python out)") from error
    path = folder.path.absolute()
    place = next(above for above in (path, *path.parents) if above.is_dir())
    written = sum(_size(Path(above) / name) for above, _, names in os.walk(path) for name in names)
    free = shutil.disk_usage(place).free
    if needed > free + written:
        raise UserError(
            f"{folder.path}: the run takes {size(needed)} with its checkpoints, but {size(free)} are free on the disk "
            f"of {place}; name a folder on another disk (logging.dir, in Python out), or lower {lower}"
        )


def _size(file: Path) -> int:
    """Bytes of a file; 0 if another process has removed it."""
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def require_room(parts: Distillation, folder: RunFolder) -> None:
    """Refuse a distillation whose pools or files this machine cannot hold.

    Raises:
        UserError: names what to lower.
    """
    config = parts.config
    here = config.trainer.per_node * parts.pool_bytes
    kept = 2 * config.trainer.per_node * parts.replay_bytes  # old and new ones, while they are joined
    place = parts.pool_place(default_device(config.trainer.accelerator))
    mapped = place == "mmap"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not mapped and here > memory:
        saved = " while it is saved" if place == "device" else ""
        room = f"takes {size(here)}{saved}, but there are {size(memory)} of memory here"
        if parts.own_slots > parts.slots:
            raise UserError(
                f"devices: a share of the run's pools of {parts.all_slots:,} slots {room}; continue it on more devices"
            )
        raise UserError(f"rho: the pool {room}; lower rho")
    if kept > memory:
        raise UserError(
            f"replay: the predictions take {size(kept)}, but there are {size(memory)} of memory here; lower replay"
        )
    files = parts.all_pool_bytes + config.trainer.ranks * parts.replay_bytes
    needed = disk_needed(parts.student.parameters, config.trainer, config.logging, files, mapped * parts.all_pool_bytes)
    require_disk(folder, needed, "rho")
