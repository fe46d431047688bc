"""A distillation from checkpoint to student folder."""

import time
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn
from tqdm import tqdm

from ldm_dkdm.assemble import Model, check_loss, load_first_stage, load_teacher, make_schedule, make_student
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distill.module import StudentModule
from ldm_dkdm.distill.pool import NoisyPool, pool_slots
from ldm_dkdm.distill.stream import DistillStream
from ldm_dkdm.distill.warmup import warm_up
from ldm_dkdm.errors import Stopped, UserError
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.generate import SamplerConfig
from ldm_dkdm.precision import resolve_precision
from ldm_dkdm.runs.export import export_on_save
from ldm_dkdm.runs.interrupt import GracefulStop
from ldm_dkdm.runs.loop import RunFolder, default_device, fit, open_run
from ldm_dkdm.runs.samples import SampleGrid
from ldm_dkdm.runs.saving import RunCheckpoint, pool_path, step_of, warmup_path
from ldm_dkdm.schema import DistillRun, FirstStagePointer, ModelCard
from ldm_dkdm.teacher import Teacher

SECONDS_BETWEEN_WARMUP_SAVES = 600.0
FIXED = ("teacher", "student", "first_stage", "diffusion", "distill", "trainer.seed")  # for a run's whole life


@dataclass(frozen=True)
class Parts:
    """Everything a distillation needs, loaded and found to fit together."""

    model: Model  # the teacher's network and card
    teacher: Teacher
    student: nn.Module
    codec: LatentCodec
    pointer: FirstStagePointer
    schedule: NoiseSchedule
    precision: str
    slots: int


def assemble(config: DistillRun) -> Parts:
    """Load and check every part; nothing is written."""
    check_loss(config.distill.loss, "distill.loss")
    if config.distill.warmup.mode == "ancestral" and config.distill.warmup.t_cap is not None:
        raise UserError("distill.warmup.t_cap: has no effect on an ancestral warm-up; remove it or choose mode: ddim")
    device = default_device(config.trainer.accelerator)
    precision = resolve_precision(config.trainer.precision, device)
    model = load_teacher(config)
    codec, pointer = load_first_stage(config.first_stage, model, precision)
    torch.manual_seed(config.trainer.seed)  # of the student's first weights
    student = make_student(config.student, model)
    schedule = make_schedule(model.card.diffusion)
    teacher = Teacher(model.network, schedule, model.card.network.parameterization, precision)
    slots = pool_slots(config.distill.rho, schedule.num_timesteps, config.distill.batch_size)
    if slots < config.distill.batch_size:
        raise UserError(
            f"distill.rho: {config.distill.rho} makes a pool of {slots} slots, fewer than a batch of "
            f"{config.distill.batch_size}; raise rho"
        )
    for key, value in (
        ("distill.stride", config.distill.stride),
        ("distill.warmup.steps", config.distill.warmup.steps),
        ("logging.sample_steps", config.logging.sample_steps),
    ):
        if value > schedule.num_timesteps:
            raise UserError(f"{key}: {value} is more than the {schedule.num_timesteps} diffusion steps")
    return Parts(model, teacher, student, codec, pointer, schedule, precision, slots)


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
    open_run(config, folder, FIXED if resumed else None)
    latest = folder.latest()
    if latest and step_of(latest) >= config.trainer.max_steps:
        print(f"{folder.path}: already distilled to step {step_of(latest)}")
        return
    log = config.logging
    module = StudentModule(
        parts.student, parts.schedule, config.student.parameterization, config.distill.loss, config.trainer
    )
    card = ModelCard("student.safetensors", config.student, parts.model.card.diffusion, info=_info(config))
    export = export_on_save(folder.model, card, parts.pointer, log.export_dtype)
    saving = RunCheckpoint(folder.checkpoints, log.save_every, export)
    sampling = SamplerConfig(log.sample_count, seed=config.trainer.seed, steps=log.sample_steps)
    grids = SampleGrid(folder.path / "samples", parts.codec, parts.model.latent_shape, log.sample_every, sampling)

    with GracefulStop() as stop:

        def stream_for(trainer: L.Trainer) -> DistillStream:
            device, rank = trainer.strategy.root_device, trainer.global_rank
            parts.teacher.to(device)
            saving.pool = pool = _new_pool(config, parts, folder, rank)
            first_step = _prepare_pool(pool, config, parts.teacher, folder, device, rank, stop)
            return DistillStream(
                parts.teacher,
                pool,
                config.distill.batch_size,
                config.trainer.max_steps,
                config.trainer.seed,
                rank,
                config.distill.stride,
                device,
                first_step,
            )

        trainer = fit(module, stream_for, config.trainer, log, folder, [grids, saving], stop, parts.precision)
    if trainer.global_step < config.trainer.max_steps:
        raise Stopped(f"stopped and saved at step {trainer.global_step}; {go_on(folder)}")


def go_on(folder: RunFolder) -> str:
    """How to resume."""
    return f"go on with: python scripts/dkdm_ldm.py --resume {folder.path}"


def _new_pool(config: DistillRun, parts: Parts, folder: RunFolder, rank: int) -> NoisyPool:
    storage = folder.path / f"pool-rank{rank}.bin" if config.distill.pool_storage == "mmap" else None
    return NoisyPool(parts.slots, parts.model.latent_shape, getattr(torch, config.distill.pool_dtype), storage)


def _info(config: DistillRun) -> dict[str, object]:
    return {"teacher": config.teacher.ckpt, "method": "DKDM, dynamic iterative distillation"}


def _prepare_pool(
    pool: NoisyPool,
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
        return pool.load(saved)
    origin = f"{config.teacher.ckpt}, seed {config.trainer.seed}, {config.distill.warmup}"
    partial = warmup_path(folder.checkpoints, rank)
    if partial.is_file():
        pool.load(partial, origin)

    def check() -> None:
        if stop.requested:
            raise Stopped(f"stopped and saved in the warm-up; {go_on(folder)}")

    last_save = time.monotonic()
    with tqdm(total=len(pool), initial=pool.filled, desc="warm-up", unit="slot", disable=rank > 0) as bar:
        try:
            for filled in warm_up(pool, teacher, config.distill.warmup, config.trainer.seed, rank, device, check):
                bar.update(filled - bar.n)
                if time.monotonic() - last_save > SECONDS_BETWEEN_WARMUP_SAVES:
                    pool.save(partial, 0, origin)
                    last_save = time.monotonic()
        finally:
            pool.save(partial, 0, origin)
    return 0
