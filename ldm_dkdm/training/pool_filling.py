"""Check the room for a run's pool, and fill it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ldm_dkdm.checkpoints.hashes import verifying
from ldm_dkdm.checkpoints.pools import (
    is_own_pool,
    pool_files,
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
from ldm_dkdm.model.ranks import WAIT, Ranks
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import Progress, counted, following, logger
from ldm_dkdm.training.finding import located
from ldm_dkdm.training.parts import Distillation
from ldm_dkdm.training.run import Run
from ldm_dkdm.training.same_teacher import pool_facts
from ldm_dkdm.training.saving import walk_path, warmup_path
from ldm_dkdm.training.warmup_shares import PoolWarmup, are_dealt, warmups_of

SECONDS_BETWEEN_WARMUP_SAVES = 600.0


def supply_of(parts: Distillation, run: Path | None = None) -> NoisyBatch | None:
    """The states of `pool_from`, a run of this package or a reference's cache, `located` around a resumed run."""
    config, teacher = parts.config, parts.teacher
    method, steps = config.distill, teacher.schedule.num_timesteps
    if method.pool_from is None:
        return None
    if VARIANTS[method.variant].from_noise:
        raise UserError("pool_from: iterative distillation begins with noise; remove the key")
    path = Path(located(method.pool_from, run) if run else method.pool_from)
    with naming("pool_from"):
        own = is_own_pool(path)
        if own and teacher.file is None:
            raise UserError(f"{path}: can be reused with a teacher that was read from a file only")
        found = read_own_pool(path, teacher.shape, pool_facts(teacher)) if own else None
    if parts.labeled and (found is None or found.label is None):
        raise UserError("pool_from: such a cache holds no labels, and the teacher is class-conditional")
    with naming("pool_from"):
        states = found or read_reference_pool(path, teacher.shape, steps)
        _require_classes(states, teacher, path)
    check_supply(states, parts.slots, config.trainer.ranks, method.batch_size, steps)
    return states


def _require_classes(states: NoisyBatch, teacher: DiffusionModel, path: Path) -> None:
    """Refuse labels that are not classes of the teacher, as in a pool from before its null label was told."""
    if states.label is None or teacher.classes is None:
        return
    others = sorted({*states.label.unique().tolist()} - {*teacher.classes})
    if others:
        raise UserError(
            f"{path}: has slots of label {others[0]}, which is not a class of the teacher (null_label); fill a new pool"
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


def prepare_pool(
    supply: NoisyBatch | None, parts: Distillation, run: Run, device: torch.device, rank: int
) -> NoisyPool:
    """A rank's pool, filled: from its checkpoint, from given states, or by the warm-up.

    Raises:
        UserError: the pool of a checkpoint is missing or damaged.
        Stopped: a signal; the warm-up so far is saved.
    """
    latest, teacher, folder = run.latest, parts.teacher, run.folder
    if latest:
        files = pool_files(folder.checkpoints, latest.stem)
        with verifying(False):  # `run.latest` has compared them with their hashes
            pool = _saved_pool(files, parts, folder.path, rank, device)
        pool.updated[pool.updated < 0] = run.first_batch  # a file of an older version
    elif supply is not None:
        pool = parts.new_pool(folder.path, rank, device)
        if rank == 0:
            logger.info(f"pool_from: {parts.config.distill.pool_from}; distill.warmup is not used")
        refill(pool, supply, teacher.schedule.num_timesteps, run.trainer.seed, rank)
    else:
        pool = _warmed_pool(parts, run, rank, device)
    pool.facts = _facts(parts, run.trainer.ranks)
    return pool


def _facts(parts: Distillation, ranks: int) -> dict[str, Any]:
    """What a pool's file says of its states, and of the ranks that fill pools together."""
    return {**pool_facts(parts.teacher), "ranks": ranks}


def going_on(parts: Distillation, folder: Path, latest: Path | None) -> Distillation:
    """The parts of a run with the pools that it goes on with: these keep their slots, however many ranks share them.

    Args:
        parts: of the run.
        folder: its checkpoints/.
        latest: the checkpoint that it continues from.

    Raises:
        UserError: there are too many ranks for the pools, or one of them is damaged.
    """
    method, ranks = parts.config.distill, parts.config.trainer.ranks
    if latest is None and method.pool_from is not None:
        return parts
    warmups = () if latest else warmups_of(folder, parts.slots, ranks)
    sizes = list(map(slots_in, pool_files(folder, latest.stem))) if latest else [one.slots for one in warmups]
    going = replace(parts, kept=sum(sizes), warmups=warmups)
    least = going.all_slots // ranks
    if least < (method.batch_size if VARIANTS[method.variant].expands else 1):
        raise UserError(f"devices: {ranks} ranks are too many for the run's pool; each would have {least} slots")
    return going


def _saved_pool(files: Sequence[Path], parts: Distillation, folder: Path, rank: int, device: torch.device) -> NoisyPool:
    """A rank's pool from a checkpoint of as many ranks, or its share of the pools of another number."""
    if len(files) == parts.config.trainer.ranks:  # maybe dealt to as many before, with another number of slots
        pool = parts.new_pool(folder, rank, device, slots_in(files[rank]))
        pool.load(files[rank])
        return pool
    _say(f"the pools of {len(files)} ranks are dealt to", parts, rank)
    return _dealt(files, parts, folder, rank, device)


def _say(what: str, parts: Distillation, rank: int) -> None:
    """The line about pools that are dealt."""
    ranks, slots = parts.config.trainer.ranks, parts.own_slots
    each = f"{slots}" if parts.all_slots % ranks == 0 else f"{slots - 1} or {slots}"
    if rank == 0:
        logger.info(f"{what} {ranks}: {each} slots each, none is lost")


def _dealt(
    files: Sequence[Path],
    parts: Distillation,
    folder: Path,
    rank: int,
    device: torch.device,
    origin: str | None = "",
) -> NoisyPool:
    """A rank's share of the pools in these files."""
    ranks = parts.config.trainer.ranks
    pool = parts.new_pool(folder, rank, device, share(files, rank, ranks))
    redeal(pool, files, rank, ranks, origin)
    return pool


def _warmed_pool(parts: Distillation, run: Run, rank: int, device: torch.device) -> NoisyPool:
    """A rank's pool after the warm-up; where another number of ranks began it, its share of what these leave.

    Each warm-up goes on with the random choices of the rank that began it, so that no call of the teacher is lost, and
    the timesteps of all pools together are those of whole warm-ups: one that is cut short has left the low ones alone.
    """
    warmups, folder, ranks = parts.warmups, run.folder, run.trainer.ranks
    together = _together(warmups, rank, ranks)
    begun = sum(one.ranks != ranks for one in warmups)
    if not are_dealt(warmups, ranks):
        if begun and rank == 0:
            shown = counted(begun, "rank")
            logger.info(f"the warm-up of {shown} goes on on {ranks}: each fills a pool of its own, none is lost")
        pool = parts.new_pool(folder.path, rank, device, warmups[rank].slots)
        _fill(pool, warmups[rank], parts, run, rank, device)
        if begun:  # some have less left to do than others
            together.wait()
        return pool
    _say(f"the warm-up of {len(warmups)} ranks goes on, and is dealt to", parts, rank)
    for one in together.share(warmups):
        pool = parts.new_pool(folder.path, rank, torch.device("cpu"), one.slots)  # mapped where the run's pools are
        _fill(pool, one, parts, run, rank, device)
        del pool
    together.wait()
    files = [warmup_path(folder.checkpoints, one.number) for one in warmups]
    return _dealt(files, parts, folder.path, rank, device, None)  # each was read by the rank that filled it


def _together(warmups: Sequence[PoolWarmup], rank: int, ranks: int) -> Ranks:
    """The ranks of a warm-up; they wait for each other longer than those of a training.

    Raises:
        UserError: they see different files.
    """
    group = distributed.new_group(timeout=WAIT, backend="gloo") if ranks > 1 else None
    together = Ranks(rank, ranks, group)
    if any(theirs != warmups for theirs in together.gather(warmups)):
        raise UserError("the processes see different warm-ups on the disk of the run folder; start the run again")
    return together


def _fill(pool: NoisyPool, one: PoolWarmup, parts: Distillation, run: Run, rank: int, device: torch.device) -> None:
    """Fill an empty pool by its warm-up."""
    mode, seed = warmup_of(run.config.distill, one.ranks), run.trainer.seed
    pool.facts = _facts(parts, one.ranks)
    origin = f"seed {seed}, {mode}" if parts.teacher.file else f"{run.config.teacher.ckpt}, seed {seed}, {mode}"
    warmup = Warmup(pool, parts.teacher, mode, seed, one.number, device, lambda: run.check_stop("in the warm-up"))
    warm_up(warmup, run.folder.checkpoints, origin, run.progress if rank == 0 else False)


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
