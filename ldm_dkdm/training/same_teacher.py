"""The teacher that a run goes on with is the one that it began with."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.averaging import KIND
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.checkpoints.ema_names import said_of_file
from ldm_dkdm.checkpoints.pools import other_facts, pool_header
from ldm_dkdm.device import is_first_rank
from ldm_dkdm.errors import UserError
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import logger
from ldm_dkdm.training.run import Run
from ldm_dkdm.training.run_folder import IN_MEMORY, step_of
from ldm_dkdm.training.saving import pool_path, warmup_path

WORDS = {"teacher_sha256": "SHA-256", "num_timesteps": "T", KIND: "kind of weights"}  # facts -> words of messages


def teacher_hash(teacher: DiffusionModel) -> str:
    """SHA-256 of the file with the teacher's weights."""
    return sha256(teacher.file) if teacher.file else IN_MEMORY


def pool_facts(teacher: DiffusionModel) -> dict[str, Any]:
    """What a pool follows from, as its file stores it; EMA or raw weights where they are told apart."""
    return {
        "teacher_sha256": teacher_hash(teacher),
        "guidance": teacher.guidance,
        "num_timesteps": teacher.schedule.num_timesteps,
        "diffusion": asdict(teacher.diffusion),
        **({KIND: teacher.info[KIND]} if teacher.info.get(KIND) else {}),
        **({} if teacher.num_classes is None else {"null_label": teacher.null_label}),
    }


def refuse_other_teacher(teacher: DiffusionModel, run: Run) -> None:
    """Refuse to continue a run, or its warm-up, with another teacher than it began with.

    A run of an older version may have begun with the raw weights of a file whose EMA is read now, which is warned of.

    Raises:
        UserError: names both.
    """
    folder = run.folder.checkpoints
    warmups = sorted(folder.glob(warmup_path(folder, 0).name.replace("rank0", "rank*")))  # any will do
    pool = pool_path(folder, step_of(run.latest), 0) if run.latest else next(iter(warmups), warmup_path(folder, 0))
    header = pool_header(pool) if pool.is_file() else None
    if header is None:
        return
    other = list(other_facts(header, pool_facts(teacher)))
    if other:
        changes = ", ".join(f"its {WORDS.get(name, name)} was {before} and is {now}" for name, before, now in other)
        raise UserError(
            f"teacher: {teacher.file or IN_MEMORY} is not the one that {run.folder.path} began with: {changes}; "
            "put the old file back, or start a new run (logging.name=NEW, in Python out)"
        )
    if is_first_rank():
        _warn_of_unsaid_weights(header, teacher, run.folder.path)


def _warn_of_unsaid_weights(header: Mapping[str, Any], teacher: DiffusionModel, run: Path) -> None:
    """Say which weights a run goes on with, where its pool does not and the file's content alone tells EMA from raw."""
    chosen = teacher.hints is not None and teacher.hints.use_ema is not None
    alone = teacher.file is None or teacher.described or said_of_file(teacher.file) is not None
    if KIND in header or teacher.info.get(KIND) != "EMA" or chosen or alone:
        return
    logger.warning(
        f"teacher: {run} is of an older version, whose pool does not say EMA or raw weights; it goes on with the EMA "
        f"weights of {teacher.file}; if it began with a warning that raw ones are used, add teacher.use_ema=false"
    )
