"""Check the room for a run's pool, and fill it."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.checkpoints.hashes import verifying
from ldm_dkdm.checkpoints.pools import (
    is_own_pool,
    other_facts,
    pool_files,
    pool_header,
    read_own_pool,
    read_reference_pool,
)
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.redeal import redeal, share, slots_in
from ldm_dkdm.distillation.refill import check_supply, refill
from ldm_dkdm.distillation.stream import VARIANTS
from ldm_dkdm.distillation.walk import read_walk
from ldm_dkdm.distillation.warmup import Warmup, warmup_of
from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import Progress, following, logger
from ldm_dkdm.training.parts import Distillation
from ldm_dkdm.training.run import Run
from ldm_dkdm.training.run_folder import IN_MEMORY, step_of
from ldm_dkdm.training.saving import pool_path, walk_path, warmup_path

SECONDS_BETWEEN_WARMUP_SAVES = 600.0
WORDS = {"teacher_sha256": "SHA-256", "num_timesteps": "T"}  # facts of a pool -> how messages call them


def supply_of(parts: Distillation) -> NoisyBatch | None:
    """The states of `pool_from`, a run of this package or a cache of the reference, checked to be enough."""
    config, teacher = parts.config, parts.teacher
    method, steps = config.distill, teacher.schedule.num_timesteps
    if method.pool_from is None:
        return None
    if VARIANTS[method.variant].from_noise:
        raise UserError("pool_from: iterative distillation begins with noise; remove the key")
    path = Path(method.pool_from)
    with naming("pool_from"):
        own = is_own_pool(path)
        if own and teacher.file is None:
            raise UserError(f"{path}: can be reused with a teacher that was read from a file only")
        found = read_own_pool(path, teacher.shape, pool_facts(teacher)) if own else None
    if parts.labeled and (found is None or found.label is None):
        raise UserError("pool_from: such a cache holds no labels, and the teacher is class-conditional")
    with naming("pool_from"):
        states = found or read_reference_pool(path, teacher.shape, steps)
    check_supply(states, parts.slots, config.trainer.ranks, method.batch_size, steps)
    return states


def teacher_hash(teacher: DiffusionModel) -> str:
    """SHA-256 of the file with the teacher's weights."""
    return sha256(teacher.file) if teacher.file else IN_MEMORY


def refuse_other_teacher(teacher: DiffusionModel, run: Run) -> None:
    """Refuse to continue a run, or its warm-up, with another teacher than it began with.

    Raises:
        UserError: names both.
    """
    folder = run.folder.checkpoints
    pool = pool_path(folder, step_of(run.latest), 0) if run.latest else warmup_path(folder, 0)
    other = list(other_facts(pool_header(pool), pool_facts(teacher))) if pool.is_file() else []
    if other:
        changes = ", ".join(f"its {WORDS.get(name, name)} was {before} and is {now}" for name, before, now in other)
        raise UserError(
            f"teacher: {teacher.file or IN_MEMORY} is not the one that {run.folder.path} began with: {changes}; "
            "put the old file back, or start a new run (logging.name=NEW, in Python out)"
        )


def refuse_overwriting(teacher: DiffusionModel, folder: Path) -> None:
    """Refuse a run folder that the teacher is in, where the student would replace it.

    Raises:
        UserError: names the teacher.
    """
    if teacher.path is not None and folder.resolve() in teacher.path.resolve().parents:
        raise UserError(
            f"teacher: {teacher.path} is in the run folder {folder}, where the student would replace it; "
            "name another folder (logging.name=NEW, in Python out)"
        )


def pool_facts(teacher: DiffusionModel) -> dict[str, Any]:
    """What the states of a pool follow from, as its file stores it."""
    return {
        "teacher_sha256": teacher_hash(teacher),
        "guidance": teacher.guidance,
        "num_timesteps": teacher.schedule.num_timesteps,
        "diffusion": asdict(teacher.diffusion),
    }


def prepare_pool(
    supply: NoisyBatch | None, parts: Distillation, run: Run, device: torch.device, rank: int
) -> NoisyPool:
    """A rank's pool, filled: from its checkpoint, from given states, or by the warm-up.

    Raises:
        UserError: the pool of a checkpoint is missing or damaged.
        Stopped: a signal; the warm-up so far is saved.
    """
    latest, teacher, seed = run.latest, parts.teacher, run.trainer.seed
    facts = {**pool_facts(teacher), "ranks": run.trainer.ranks}
    if latest:
        files = pool_files(run.folder.checkpoints, latest.stem)
        with verifying(False):  # `run.latest` has compared them with their hashes
            pool = _saved_pool(files, parts, run, rank, device)
        pool.updated[pool.updated < 0] = run.first_batch  # a file of an older version
        pool.facts = facts
        return pool
    pool = parts.new_pool(run.folder.path, rank, device)
    pool.facts = facts
    if supply is not None:
        refill(pool, supply, teacher.schedule.num_timesteps, seed, rank)
    else:
        mode = warmup_of(run.config.distill, run.trainer.ranks)
        origin = f"{run.config.teacher.ckpt}, seed {seed}, {mode}"
        warmup = Warmup(pool, teacher, mode, seed, rank, device, lambda: run.check_stop("in the warm-up"))
        warm_up(warmup, run.folder.checkpoints, origin, run.progress if rank == 0 else False)
    return pool


def _saved_pool(files: Sequence[Path], parts: Distillation, run: Run, rank: int, device: torch.device) -> NoisyPool:
    """A rank's pool from a checkpoint of as many ranks, or its share of the pools of another number."""
    ranks = run.trainer.ranks
    if len(files) == ranks:  # maybe dealt to as many before, with another number of slots
        pool = parts.new_pool(run.folder.path, rank, device, slots_in(files[rank]))
        pool.load(files[rank])
        return pool
    least, most = share(files, ranks - 1, ranks), share(files, 0, ranks)
    if least < (parts.config.distill.batch_size if VARIANTS[parts.config.distill.variant].expands else 1):
        raise UserError(f"devices: {ranks} ranks are too many for the run's pool; each would have {least} slots")
    if rank == 0:
        each = f"{most}" if least == most else f"{least} or {most}"
        logger.info(f"the pools of {len(files)} ranks are dealt to {ranks}: {each} slots each, none is lost")
    pool = parts.new_pool(run.folder.path, rank, device, share(files, rank, ranks))
    redeal(pool, files, rank, ranks)
    return pool


def warm_up(warmup: Warmup, folder: Path, origin: str, progress: bool | Progress = False) -> None:
    """Run a warm-up, or continue an interrupted one; it is saved from time to time and at its end.

    Args:
        warmup: with an empty pool.
        folder: checkpoints/ of the run.
        origin: names what fills the pool; an interrupted warm-up of another origin is refused.
        progress: as `reporting.following`; it counts samples in teacher calls.

    Raises:
        UserError: what an interrupted warm-up left is damaged, or of another origin.
    """
    _go_on(warmup, folder, origin)
    last_save, calls = time.monotonic(), warmup.calls
    with following(progress if calls else False, "warm-up", "call", calls, warmup.done, "the teacher") as done:
        try:
            for made in warmup.run():
                done(made)
                if time.monotonic() - last_save > SECONDS_BETWEEN_WARMUP_SAVES:
                    _save(warmup, folder, origin)
                    last_save = time.monotonic()
        finally:
            _save(warmup, folder, origin)
        done(calls)


def _go_on(warmup: Warmup, folder: Path, origin: str) -> None:
    """Load what an interrupted warm-up left; without a pool, what is left of its chains says nothing and is removed."""
    partial, walk = warmup_path(folder, warmup.rank), walk_path(folder, warmup.rank)
    if not partial.is_file():
        walk.unlink(missing_ok=True)
        return
    try:
        warmup.pool.load(partial, origin)
    except UserError as error:
        raise UserError(f"{error}; delete it to start the warm-up again") from error
    if walk.is_file():
        try:
            warmup.under_way = read_walk(walk, origin, warmup.device)
        except UserError as error:
            raise UserError(f"{error}; delete it to start its batch of chains again") from error


def _save(warmup: Warmup, folder: Path, origin: str) -> None:
    """Save the pool, and after it where the chains are: from an earlier place they leave the same states once more."""
    walk = walk_path(folder, warmup.rank)
    warmup.pool.save(warmup_path(folder, warmup.rank), 0, origin)
    if warmup.under_way is None:
        walk.unlink(missing_ok=True)
    else:
        warmup.under_way.save(walk, origin)
