"""Distillation: a teacher, a student, a folder; no image (DKDM, Alg. 1 with Sec. 3.3)."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.checkpoints.pools import read_reference_pool
from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.schema import (
    DiffusionConfig,
    DistillConfig,
    DistillRun,
    FirstStageConfig,
    LoggingConfig,
    LossConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
    WarmupConfig,
)
from ldm_dkdm.device import is_first_rank
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.distillation.pool import NoisyPool, pool_slots, slot_bytes
from ldm_dkdm.distillation.refill import check_supply, refill
from ldm_dkdm.distillation.stream import VARIANTS, DistillStream
from ldm_dkdm.distillation.student import check_loss, require_call, require_fit
from ldm_dkdm.distillation.warmup import WARMUPS, Warmup, preparation
from ldm_dkdm.errors import UserError, naming, nearest
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import Progress, following, logger, size
from ldm_dkdm.training.export import export_on_save
from ldm_dkdm.training.folder import RunFolder, step_of
from ldm_dkdm.training.grids import SampleGrid
from ldm_dkdm.training.run import Result, Run
from ldm_dkdm.training.saving import RunCheckpoint, pool_path, warmup_path

SECONDS_BETWEEN_WARMUP_SAVES = 600.0
IN_MEMORY = "a model made in Python"


def distill(
    teacher: DiffusionModel,
    student: DiffusionModel,
    out: str | Path,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    rho: float | None = None,
    warmup: str | Mapping[str, Any] | WarmupConfig = "ancestral",
    loss: str | Mapping[str, Any] | LossConfig = "eps",
    learning_rate: float = 1e-4,
    check: bool = True,
    config: DistillRun | None = None,
    resume: bool = False,
    progress: bool | Progress = True,
    **options: Any,
) -> Result:
    """Distil a teacher into a student without data; a second call goes on where the first one stopped.

    Ctrl-C saves after the running iteration and raises `Stopped`. Afterwards the student has its EMA weights.

    Args:
        teacher: it is put in eval mode and frozen.
        student: on the same states, for example `teacher.narrowed("60M")` or `DiffusionModel(net, like=teacher)`.
        out: folder of the run.
        steps: optimizer steps. batch_size: states in a batch, per device.
        rho: the pool of `dynamic` has round(rho * T) * batch_size slots (the paper: 0.4 in pixel space, 4 on latents).
        warmup: a mode of WARMUPS, or the keys of `WarmupConfig`.
        loss: one of LOSS_SPACES, or the keys of `LossConfig`.
        learning_rate: of Adam.
        check: first find out whether the teacher denoises its own samples (`DiffusionModel.check`).
        config: a whole configuration in place of these numbers, as a YAML file gives it.
        resume: go on in `out` although keys of `TrainerConfig` or `LoggingConfig` have changed.
        progress: show bars, or call a function (what, done, total).
        options: further keys of `DistillConfig`, `TrainerConfig` and `LoggingConfig`: variant, discard, stride, seed,
            ema_decay, lr_schedule, precision, devices, save_every, sample_every, ...

    Returns:
        The student, the folder, the steps taken and what ended the run.

    Raises:
        UserError: parts that do not fit, a bad value, or a folder that holds another run.
        Stopped: Ctrl-C; all is saved.
    """
    if config is None:
        numbers = {"max_steps": steps, "batch_size": batch_size, "rho": rho, "learning_rate": learning_rate}
        config = run_config(teacher, student, Path(out), warmup, loss, check, {**numbers, **options})
    run = Run(config, RunFolder(Path(out), config.MODEL), resume, progress)
    return distil_in(run, teacher, student)


def run_config(
    teacher: DiffusionModel,
    student: DiffusionModel,
    out: Path,
    warmup: str | Mapping[str, Any] | WarmupConfig,
    loss: str | Mapping[str, Any] | LossConfig,
    check: bool,
    numbers: Mapping[str, Any],
) -> DistillRun:
    """The configuration of a call from Python: what the models remember, and numbers by their keys.

    Raises:
        UserError: an unknown or missing key, or a bad value.
    """
    sections: dict[type, dict[str, Any]] = {DistillConfig: {}, TrainerConfig: {}, LoggingConfig: {}}
    given = {key: value for key, value in numbers.items() if value is not None}
    owner = {f.name: section for section in sections for f in fields(section)}
    for key, value in given.items():
        if key not in owner:
            raise UserError(f"{key}: unknown argument{nearest(key, owner)}")
        sections[owner[key]][key] = value
    for key, word in (("max_steps", "steps"), ("batch_size", "batch_size")):
        if key not in given:
            raise UserError(f"{word}: missing")
    hints, node = teacher.hints, student.node
    return DistillRun(
        teacher=TeacherConfig(
            ckpt=str(teacher.path or IN_MEMORY),
            target=hints.target,
            params=dict(hints.params),
            parameterization=hints.parameterization,
            use_ema=hints.use_ema,
            guidance=teacher.guidance,
            null_label=hints.null_label,
            check=check,
        ),
        student=StudentConfig(target=node.target, params=dict(node.params), parameterization=node.parameterization),
        distill=DistillConfig(
            warmup=WarmupConfig(mode=warmup) if isinstance(warmup, str) else convert(WarmupConfig, warmup, "warmup"),
            loss=LossConfig(space=loss) if isinstance(loss, str) else convert(LossConfig, loss, "loss"),
            **sections[DistillConfig],
        ),
        trainer=TrainerConfig(**sections[TrainerConfig]),
        first_stage=hints.first_stage if teacher.space.encoded else FirstStageConfig(),
        diffusion=DiffusionConfig(**hints.diffusion) if hints.diffusion else None,
        logging=LoggingConfig(**{"dir": str(out.parent), "name": out.name, **sections[LoggingConfig]}),
    )


@dataclass(frozen=True)
class Distillation:
    """Teacher, student and configuration of one run, found to fit together.

    Attributes:
        teacher, student: on the same states.
        config: the whole configuration.
        slots: of one rank's pool.
    """

    teacher: DiffusionModel
    student: DiffusionModel
    config: DistillRun
    slots: int

    @property
    def labeled(self) -> bool:
        """Whether slots keep a class label."""
        return self.teacher.num_classes is not None

    @property
    def pool_dtype(self) -> torch.dtype:
        """Number format of the pool's states."""
        return getattr(torch, self.config.distill.pool_dtype)

    @property
    def pool_bytes(self) -> int:
        """Of one rank's pool."""
        return self.slots * slot_bytes(self.teacher.shape, self.pool_dtype, self.labeled)

    @property
    def batches(self) -> int:
        """That the student sees in the whole run."""
        return self.config.trainer.max_steps * self.config.trainer.accumulate

    def module(self) -> StudentModule:
        """The student in training."""
        return StudentModule(self.student, self.config.distill.loss, self.config.trainer)

    def new_pool(self, folder: Path, rank: int) -> NoisyPool:
        """An empty pool of one rank."""
        storage = folder / f"pool-rank{rank}.bin" if self.config.distill.pool_storage == "mmap" else None
        return NoisyPool(self.slots, self.teacher.shape, self.pool_dtype, storage, self.labeled)


def assemble(teacher: DiffusionModel, student: DiffusionModel, config: DistillRun) -> Distillation:
    """Check every part and number of a distillation; nothing is written.

    Raises:
        UserError: the first thing that does not fit.
    """
    method, steps = config.distill, teacher.schedule.num_timesteps
    mode = preparation(method).mode
    if not WARMUPS[mode].takes_t_cap and method.warmup.t_cap is not None:
        raise UserError(
            "warmup.t_cap: has an effect with mode: ddim or dpm-solver++ only, "
            "and none with variant: iterative; remove it, or set it to null"
        )
    require_fit(student, teacher)
    require_call(student)
    check_loss(method.loss, teacher.schedule)
    for key, value in (
        ("stride", method.stride),
        ("warmup.steps", method.warmup.steps),
        ("sample_steps", config.logging.sample_steps),
    ):
        if value > steps:
            raise UserError(f"{key}: {value} is more than the {steps} diffusion steps")
    return Distillation(teacher, student, config, _slots(method, steps))


def _slots(config: DistillConfig, num_timesteps: int) -> int:
    if not VARIANTS[config.variant].expands:
        return config.batch_size
    if config.rho is None:
        raise UserError("rho: missing; dynamic distillation needs the size of its pool, the paper's is 0.4 or 4")
    slots = pool_slots(config.rho, num_timesteps, config.batch_size)
    if slots < config.batch_size:
        raise UserError(
            f"rho: {config.rho} makes a pool of {slots} slots, fewer than a batch of {config.batch_size}; raise rho"
        )
    return slots


def distil_in(run: Run, teacher: DiffusionModel, student: DiffusionModel) -> Result:
    """Warm the pool up and train the student in a run's folder; errors as `distill`."""
    teacher.codec()  # shared with the student; refuses what does not fit before anything is written
    teacher = teacher.frozen().changed(precision=run.precision)
    student = student.changed(precision=run.precision, _codec=teacher.codec(), first_stage=teacher.first_stage)
    parts, supply = assemble(teacher, student, run.config), None
    if not run.folder.latest():
        _require_room(parts)
        supply = _supply(parts)
        _check_teacher(parts, run)
    if end := run.end():
        logger.info(f"{run.folder.path}: {end}")
        return _ended(run, student, end)
    student.network.train()
    saving = RunCheckpoint(run.folder.checkpoints, run.config.logging.save_every, _export(parts, run))
    grids = SampleGrid(run.folder.path / "samples", run.config.logging, run.trainer.seed)

    def stream_for(trainer: L.Trainer) -> DistillStream:
        device, rank = trainer.strategy.root_device, trainer.global_rank
        teacher.to(device)
        saving.pool = pool = parts.new_pool(run.folder.path, rank)
        prepare_pool(pool, supply, parts, run, device, rank)
        method, seed = run.config.distill, run.trainer.seed
        return DistillStream(teacher, pool, method, parts.batches, seed, rank, device, run.first_batch)

    with run.open():
        result = run.fit(parts.module(), stream_for, [grids, saving])
    for mapped in run.folder.path.glob("pool-rank*.bin"):  # the checkpoints hold the same
        mapped.unlink(missing_ok=True)
    student.network.eval()
    student.path = run.folder.model
    return replace(result, model=student)


def _ended(run: Run, student: DiffusionModel, end: str) -> Result:
    """The student of a run that has nothing more to do, with the weights that it saved."""
    weights = run.folder.model / f"{run.folder.model_name}.safetensors"
    load_strictly(student.network.eval(), read_tensors(weights), weights)
    student.path = run.folder.model
    return Result(student, run.folder.path, run.step, end)


def _require_room(parts: Distillation) -> None:
    """Refuse pools that this machine cannot hold, before anything is written."""
    config = parts.config
    needed = config.trainer.devices * parts.pool_bytes
    if config.distill.pool_storage == "mmap":
        logs = Path(config.logging.dir).absolute()
        place = next(folder for folder in (logs, *logs.parents) if folder.is_dir())
        room, what = shutil.disk_usage(place).free, f"free on the disk of {config.logging.dir}"
    else:
        room, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of memory here"
    if needed > room:
        raise UserError(f"rho: the pool takes {size(needed)}, but there are {size(room)} {what}; lower rho")


def _check_teacher(parts: Distillation, run: Run) -> None:
    """The teacher check, unless it is switched off; one process asks for all."""
    if not run.config.teacher.check or not is_first_rank():
        return
    started = time.monotonic()
    try:
        figures = parts.teacher.to(run.device).check()
    except UserError as error:
        raise UserError(
            f"teacher: {error}; check=False (teacher.check=false in a config) distils it all the same"
        ) from error
    logger.info(
        f"teacher check: eps error {figures.linear:.2f} of a linear denoiser's at T/4, scale off by "
        f"{figures.deviation:.3f} at most ({time.monotonic() - started:.0f} s)"
    )


def _export(parts: Distillation, run: Run) -> Callable[[L.Trainer], None]:
    student = parts.student.changed(info={**parts.student.info, **teacher_facts(parts)})
    return export_on_save(student, run.folder, run.config.logging.export_dtype)


def teacher_facts(parts: Distillation) -> dict[str, Any]:
    """Name, SHA-256 and licence (as the user states it) of the teacher, and the recipe, for the student's card."""
    teacher, distill, trainer = parts.config.teacher, parts.config.distill, parts.config.trainer
    return {
        "teacher": teacher.ckpt,
        "teacher_sha256": sha256(parts.teacher.file) if parts.teacher.file else IN_MEMORY,
        "teacher_licence": teacher.licence or "not stated (teacher.licence)",
        "method": f"DKDM, {distill.variant} iterative distillation",
        "batch_size": distill.batch_size * trainer.accumulate * trainer.devices,
        "learning_rate": trainer.learning_rate,
        "ema_decay": trainer.ema_decay,
    }


def _supply(parts: Distillation) -> NoisyBatch | None:
    """The states of `pool_from`, found to be enough."""
    config, teacher = parts.config, parts.teacher
    method, steps = config.distill, teacher.schedule.num_timesteps
    if method.pool_from is None:
        return None
    if parts.labeled:
        raise UserError("pool_from: such a cache holds no labels, and the teacher is class-conditional")
    if VARIANTS[method.variant].from_noise:
        raise UserError("pool_from: iterative distillation begins with noise; remove the key")
    with naming("pool_from"):
        states = read_reference_pool(Path(method.pool_from), teacher.shape, steps)
    check_supply(states, parts.slots, config.trainer.devices, method.batch_size, steps)
    return states


def prepare_pool(
    pool: NoisyPool, supply: NoisyBatch | None, parts: Distillation, run: Run, device: torch.device, rank: int
) -> None:
    """Fill a rank's pool: from its checkpoint, from states that were given, or by the warm-up.

    Raises:
        UserError: the pool of a checkpoint is missing or damaged.
        Stopped: a signal; the warm-up so far is saved.
    """
    latest, teacher, seed = run.folder.latest(), parts.teacher, run.trainer.seed
    if latest:
        saved = pool_path(run.folder.checkpoints, step_of(latest), rank)
        if not saved.is_file():
            raise UserError(f"{saved}: missing; the checkpoint beside it cannot be resumed without its pool")
        pool.load(saved)
    elif supply is not None:
        refill(pool, supply, teacher.schedule.num_timesteps, seed, rank)
    else:
        mode = preparation(run.config.distill)
        origin = f"{run.config.teacher.ckpt}, seed {seed}, {mode}"
        warmup = Warmup(pool, teacher, mode, seed, rank, device, lambda: run.check_stop("in the warm-up"))
        _warm_up(warmup, warmup_path(run.folder.checkpoints, rank), origin, run.progress if rank == 0 else False)


def _warm_up(warmup: Warmup, partial: Path, origin: str, progress: bool | Progress) -> None:
    """Run a warm-up, or go on with an interrupted one; it is saved from time to time and at its end."""
    pool = warmup.pool
    if partial.is_file():
        pool.load(partial, origin)
    last_save = time.monotonic()
    with following(progress, "warm-up", "slot", len(pool), pool.filled) as done:
        try:
            for filled in warmup.run():
                done(filled)
                if time.monotonic() - last_save > SECONDS_BETWEEN_WARMUP_SAVES:
                    pool.save(partial, 0, origin)
                    last_save = time.monotonic()
        finally:
            pool.save(partial, 0, origin)
