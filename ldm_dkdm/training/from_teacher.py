"""A distillation from checkpoint to student folder."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import nn
from tqdm import tqdm

from ldm_dkdm.assemble import Codec, check_loss, load_first_stage, make_student
from ldm_dkdm.checkpoints.diffusers_folder import is_pipeline
from ldm_dkdm.checkpoints.export import read_description
from ldm_dkdm.checkpoints.folder import home_of, is_model_folder
from ldm_dkdm.checkpoints.pools import read_reference_pool
from ldm_dkdm.config.schema import DistillConfig, DistillRun, FirstStagePointer, ModelCard, NetworkConfig, TrainerConfig
from ldm_dkdm.device import default_device, is_first_rank, resolve_precision
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.distillation.pool import NoisyPool, pool_slots, slot_bytes
from ldm_dkdm.distillation.refill import check_supply, refill
from ldm_dkdm.distillation.stream import VARIANTS, DistillStream
from ldm_dkdm.distillation.warmup import Warmup, preparation
from ldm_dkdm.errors import Stopped, UserError, naming
from ldm_dkdm.evaluation.teacher_check import check_teacher
from ldm_dkdm.generate import SamplerConfig
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import size
from ldm_dkdm.sources import Model, load_teacher
from ldm_dkdm.teacher import Teacher
from ldm_dkdm.training.card import teacher_facts
from ldm_dkdm.training.export import export_on_save
from ldm_dkdm.training.folder import RunFolder, alone_in, check_run, go_on, open_run, step_of
from ldm_dkdm.training.grids import SampleGrid
from ldm_dkdm.training.interrupt import GracefulStop
from ldm_dkdm.training.loop import finished, first_batch, fit, training_device
from ldm_dkdm.training.saving import RunCheckpoint, pool_path, warmup_path

SECONDS_BETWEEN_WARMUP_SAVES = 600.0


@dataclass(frozen=True)
class Parts:
    """Everything a distillation needs, loaded and found to fit together."""

    model: Model  # the teacher's network and card
    teacher: Teacher
    student: nn.Module
    card: NetworkConfig  # the student's
    codec: Codec
    pointer: FirstStagePointer | None
    schedule: NoiseSchedule
    precision: str
    slots: int


def assemble(config: DistillRun, planning: bool = False) -> Parts:
    """Load and check every part; nothing is written. `planning` does without checkpoints that are missing."""
    if preparation(config.distill).mode in ("ancestral", "noise") and config.distill.warmup.t_cap is not None:
        raise UserError(
            "distill.warmup.t_cap: has an effect with mode: ddim or dpm-solver++ only, "
            "and none with variant: iterative; remove it, or set it to null"
        )
    device = default_device(config.trainer.accelerator) if planning else training_device(config.trainer)
    precision = resolve_precision(config.trainer.precision, device)
    model = load_teacher(config, planning)
    codec, pointer = load_first_stage(config.first_stage, model, precision, planning)
    torch.manual_seed(config.trainer.seed)  # of the student's first weights
    student, node = make_student(config.student, model)
    teacher = model.as_teacher(precision, config.teacher.guidance, config.teacher.null_label)
    schedule = teacher.schedule
    check_loss(config.distill.loss, schedule, "distill.loss")
    slots = _slots(config.distill, schedule.num_timesteps)
    for key, value in (
        ("distill.stride", config.distill.stride),
        ("distill.warmup.steps", config.distill.warmup.steps),
        ("logging.sample_steps", config.logging.sample_steps),
    ):
        if value > schedule.num_timesteps:
            raise UserError(f"{key}: {value} is more than the {schedule.num_timesteps} diffusion steps")
    return Parts(model, teacher, student, node, codec, pointer, schedule, precision, slots)


def _slots(config: DistillConfig, num_timesteps: int) -> int:
    if not VARIANTS[config.variant].expands:
        return config.batch_size
    if config.rho is None:
        raise UserError(
            "distill.rho: missing; dynamic distillation needs the size of its pool, the paper's is 0.4 or 4"
        )
    slots = pool_slots(config.rho, num_timesteps, config.batch_size)
    if slots < config.batch_size:
        raise UserError(
            f"distill.rho: {config.rho} makes a pool of {slots} slots, fewer than a batch of "
            f"{config.batch_size}; raise rho"
        )
    return slots


def _check_room(config: DistillRun, parts: Parts) -> None:
    """Refuse pools that this machine cannot hold, before anything is written."""
    needed = config.trainer.devices * pool_bytes(config, parts)
    if config.distill.pool_storage == "mmap":
        logs = Path(config.logging.dir).absolute()
        place = next(folder for folder in (logs, *logs.parents) if folder.is_dir())
        room, what = shutil.disk_usage(place).free, f"free on the disk of {config.logging.dir}"
    else:
        room, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of memory here"
    if needed > room:
        raise UserError(f"distill.rho: the pool takes {size(needed)}, but there are {size(room)} {what}; lower rho")


def pool_bytes(config: DistillRun, parts: Parts) -> int:
    """Of one rank's pool."""
    dtype, labeled = getattr(torch, config.distill.pool_dtype), parts.teacher.num_classes is not None
    return parts.slots * slot_bytes(parts.model.latent_shape, dtype, labeled)


def distill(config: DistillRun, folder: RunFolder, resumed: bool = False) -> None:
    """Warm the pool up and train the student; a second call goes on where the first stopped.

    Args:
        config: the validated configuration.
        folder: where the run writes.
        resumed: go on in `folder` although trainer or logging keys have changed.

    Raises:
        UserError: parts that do not fit, or a run folder of another configuration.
        Stopped: a signal ended the run early; all is saved.
    """
    parts = assemble(config)
    supply = None
    if not folder.latest():
        _check_room(config, parts)
        supply = _supply(config, parts)
        _check(config, parts)
    check_run(config, folder, resumed)
    if end := finished(folder, config.trainer):
        print(f"{folder.path}: {end}")
        return
    module = student_module(config, parts, config.trainer)
    saving, grids = _callbacks(config, parts, folder)

    with alone_in(folder), GracefulStop() as stop:
        open_run(config, folder, resumed)

        def stream_for(trainer: L.Trainer) -> DistillStream:
            device, rank = trainer.strategy.root_device, trainer.global_rank
            parts.teacher.to(device)
            saving.pool = pool = _new_pool(config, parts, folder, rank)
            first_step = _prepare_pool(pool, supply, config, parts.teacher, folder, device, rank, stop)
            batches = config.trainer.max_steps * config.trainer.accumulate
            seed = config.trainer.seed
            return DistillStream(parts.teacher, pool, config.distill, batches, seed, rank, device, first_step)

        callbacks, log = [grids, saving], config.logging
        fit(module, stream_for, config.trainer, log, folder, callbacks, stop, parts.precision, go_on(config, folder))
    for mapped in folder.path.glob("pool-rank*.bin"):  # the checkpoints hold the same
        mapped.unlink(missing_ok=True)


def _check(config: DistillRun, parts: Parts) -> None:
    """The gate (`gate.check_teacher`), unless it is switched off; one process asks for all."""
    if not config.teacher.check or not is_first_rank():
        return
    started = time.monotonic()
    device = default_device(config.trainer.accelerator)
    path = home_of(Path(config.teacher.ckpt))
    told = is_model_folder(path) or is_pipeline(path) or read_description(path) is not None
    figures = check_teacher(parts.model, parts.teacher.to(device), device, told)
    print(
        f"teacher check: eps error {figures.linear:.2f} of a linear denoiser's at T/4, scale off by "
        f"{figures.deviation:.3f} at most ({time.monotonic() - started:.0f} s)"
    )


def _callbacks(config: DistillRun, parts: Parts, folder: RunFolder) -> tuple[RunCheckpoint, SampleGrid]:
    log, teacher = config.logging, parts.teacher
    diffusion = parts.model.card.diffusion
    info = teacher_facts(config)
    known = teacher.null_label is not None and teacher.null_label < (parts.student.num_classes or 0)
    null_label = teacher.null_label if known else None  # a row of the student's table that it never sees
    card = ModelCard("student.safetensors", parts.card, diffusion, null_label=null_label, info=info)
    saving = RunCheckpoint(
        folder.checkpoints, log.save_every, export_on_save(folder.model, card, parts.pointer, log.export_dtype)
    )
    sampling = SamplerConfig(log.sample_count, seed=config.trainer.seed, steps=log.sample_steps)
    samples, shape = folder.path / "samples", parts.model.latent_shape
    return saving, SampleGrid(samples, parts.codec, shape, log.sample_every, sampling, teacher.classes)


def student_module(config: DistillRun, parts: Parts, trainer: TrainerConfig) -> StudentModule:
    """The student in training."""
    loss, parameterization = config.distill.loss, parts.card.parameterization
    return StudentModule(parts.student, parts.schedule, parameterization, loss, trainer, parts.model.denoiser)


def _new_pool(config: DistillRun, parts: Parts, folder: RunFolder, rank: int) -> NoisyPool:
    storage = folder.path / f"pool-rank{rank}.bin" if config.distill.pool_storage == "mmap" else None
    labeled = parts.teacher.num_classes is not None
    return NoisyPool(parts.slots, parts.model.latent_shape, getattr(torch, config.distill.pool_dtype), storage, labeled)


def _supply(config: DistillRun, parts: Parts) -> NoisyBatch | None:
    """The states of `distill.pool_from`, found to be enough."""
    if config.distill.pool_from is None:
        return None
    if parts.teacher.num_classes is not None:
        raise UserError("distill.pool_from: such a cache holds no labels, and the teacher is class-conditional")
    if VARIANTS[config.distill.variant].from_noise:
        raise UserError("distill.pool_from: iterative distillation begins with noise; remove the key")
    steps = parts.schedule.num_timesteps
    with naming("distill.pool_from"):
        states = read_reference_pool(Path(config.distill.pool_from), parts.model.latent_shape, steps)
    check_supply(states, parts.slots, config.trainer.devices, config.distill.batch_size, steps)
    return states


def _prepare_pool(
    pool: NoisyPool,
    supply: NoisyBatch | None,
    config: DistillRun,
    teacher: Teacher,
    folder: RunFolder,
    device: torch.device,
    rank: int,
    stop: GracefulStop,
) -> int:
    """Load this rank's pool or warm it up; returns the step at which the training goes on."""
    latest = folder.latest()
    if latest:
        saved = pool_path(folder.checkpoints, step_of(latest), rank)
        if not saved.is_file():
            raise UserError(f"{saved}: missing; the checkpoint beside it cannot be resumed without its pool")
        pool.load(saved)
        return first_batch(folder, config.trainer)
    if supply is not None:
        refill(pool, supply, teacher.schedule.num_timesteps, config.trainer.seed, rank)
        return 0
    warmup = preparation(config.distill)
    origin = f"{config.teacher.ckpt}, seed {config.trainer.seed}, {warmup}"
    partial = warmup_path(folder.checkpoints, rank)
    if partial.is_file():
        pool.load(partial, origin)

    def check() -> None:
        if stop.requested:
            raise Stopped(f"stopped and saved in the warm-up; {go_on(config, folder)}")

    last_save = time.monotonic()
    with tqdm(total=len(pool), initial=pool.filled, desc="warm-up", unit="slot", disable=rank > 0) as bar:
        try:
            for filled in Warmup(pool, teacher, warmup, config.trainer.seed, rank, device, check).run():
                bar.update(filled - bar.n)
                if time.monotonic() - last_save > SECONDS_BETWEEN_WARMUP_SAVES:
                    pool.save(partial, 0, origin)
                    last_save = time.monotonic()
        finally:
            pool.save(partial, 0, origin)
    return 0
