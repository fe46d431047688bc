"""Distil a teacher into a student without data (DKDM, Alg. 1 with Sec. 3.3)."""

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ldm_dkdm.config.schema import (
    DistillRun,
    LossConfig,
    TrainerConfig,
    WarmupConfig,
)
from ldm_dkdm.device import compiles, is_first_rank
from ldm_dkdm.distillation.replay import stream_kind
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.arguments import require_model, require_path
from ldm_dkdm.model.guidance import learned_guidance, rows_of
from ldm_dkdm.networks.modes import compiled, frozen_meanwhile, make_trainable, replayed, stored_in_bf16
from ldm_dkdm.reporting import Progress, logger, size
from ldm_dkdm.training.agreement_callback import Agreement
from ldm_dkdm.training.calls import distillation_of, refuse_beside, run_of
from ldm_dkdm.training.export import Export, exporting, on_save
from ldm_dkdm.training.grids import SampleGrid
from ldm_dkdm.training.parts import Distillation, assemble
from ldm_dkdm.training.pool_filling import (
    going_on,
    prepare_pool,
    refuse_overwriting,
    supply_of,
)
from ldm_dkdm.training.pool_log import PoolLog
from ldm_dkdm.training.room import require_room
from ldm_dkdm.training.run import Result, Run
from ldm_dkdm.training.same_teacher import pool_facts, refuse_other_teacher, teacher_hash
from ldm_dkdm.training.saving import RunCheckpoint, tidy

BEFORE = "before the training"


@torch.inference_mode(False)
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
    signals: Sequence[int] = (signal.SIGINT,),
    go_on: str | None = None,
    **options: Any,
) -> Result:
    """Distil a teacher into a student without data; a second call continues where the first one stopped.

    Ctrl-C saves after the running iteration and raises `Stopped`. Afterwards the student has its EMA weights and the
    facts of its card (`info`): teacher, recipe, steps.

    Args:
        teacher: it is put in eval mode, and frozen meanwhile.
        student: on the same states, for example `teacher.narrowed("60M")` or `DiffusionModel(net, like=teacher)`; made
            trainable if all its weights are frozen.
        out: run folder.
        steps: optimizer steps. batch_size: states in a batch, per device.
        rho: the pool of `dynamic` has round(rho * T) * batch_size slots (the paper: 0.4 in pixel space, 4 on latents).
        warmup: a mode of WARMUPS, or the keys of `WarmupConfig`.
        loss: one of LOSS_SPACES, or the keys of `LossConfig`.
        learning_rate: Adam's.
        check: first test that the teacher denoises its own samples (`DiffusionModel.check`).
        config: a whole configuration in place of these numbers, as a YAML file gives it.
        resume: continue in `out` although keys of `TrainerConfig` or `LoggingConfig` have changed.
        progress: show bars, or call a function (what, done, total).
        signals: those that stop the run at the next whole iteration; default: Ctrl-C.
        go_on: how to continue, for the message of `Stopped`; default: call it again.
        options: further keys of `DistillConfig`, `TrainerConfig` and `LoggingConfig`: variant, discard, stride, seed,
            ema_decay, lr_schedule, precision, devices, save_every, sample_every, ...

    Returns:
        The student, the run folder, the steps taken and what ended the run.

    Raises:
        UserError: parts that do not fit, a bad value, or a folder that holds another run.
        Stopped: one of the signals; all is saved.
    """
    _require_arguments(teacher, student, out)
    numbers = {"steps": steps, "batch_size": batch_size, "rho": rho, **options}
    refuse_beside(config, numbers)
    if config is None:
        given = {"learning_rate": learning_rate, **numbers}
        config = distillation_of(teacher, student, expanded(out), check, warmup, loss, given)
    run = run_of(DistillRun, config, out, resume, progress, signals, go_on)
    with frozen_meanwhile(teacher.network):
        return _distil_in(run, teacher, student)


def _require_arguments(teacher: object, student: object, out: object) -> None:
    """Refuse arguments of another kind, by name."""
    require_model(teacher, "teacher")
    require_model(student, "student")
    require_path(out, "out")


def _distil_in(run: Run, teacher: DiffusionModel, student: DiffusionModel) -> Result:
    """Warm the pool up and train the student in a run folder; errors as `distill`."""
    teacher.frozen().codec()  # refuses what does not fit before anything is written
    frozen = stored_in_bf16(teacher.network) if run.precision == "bf16" else teacher.network
    teacher = teacher.changed(precision=run.precision, network=frozen)
    trained = student.changed(precision=run.precision, first_stage=teacher.first_stage).sharing_codec(teacher)
    refuse_overwriting(teacher, run.folder.path)
    parts, supply = assemble(teacher, trained, run.config, run.resumed), None
    if end := run.end(student.network):
        return run.ended(student, end, _export(parts, run))
    make_trainable(student.network, "student", teacher.network)
    refuse_other_teacher(teacher, run)
    parts = going_on(parts, run.folder.checkpoints, run.latest)
    export = _export(parts, run)
    require_room(parts, run.folder)
    if not run.latest:
        supply = supply_of(parts, run.folder.path if run.resumed else None)
        _check_teacher(parts, run)
    student.network.train()
    log, seed = run.config.logging, run.trainer.seed
    saving = RunCheckpoint(run.folder.checkpoints, log, on_save(export))
    grids = SampleGrid(run.folder.path / "samples", log, seed, teacher)
    every = log.measure_every or log.save_every
    pools = PoolLog(run.folder.path / "pool.csv", every, teacher.schedule.num_timesteps, run.step)
    measuring = Agreement(teacher, run.folder.path / "agreement.safetensors", log.measure_every, seed)

    def stream_for(trainer: L.Trainer) -> DistillStream:
        device, rank = trainer.strategy.root_device, trainer.global_rank
        teacher.to(device)
        saving.pool = pools.pool = pool = prepare_pool(supply, parts, run, device, rank)
        if rank == 0 and device.type != "cpu":
            logger.info(f"pool: {size(len(pool) * parts.slot_bytes)} on {pool.device}{' (mmap)' * pool.mapped}")
        if rank == 0:
            measuring.prepare(pool_facts(teacher), run.trainer.max_steps, lambda: run.check_stop(BEFORE), run.progress)
        method = run.config.distill
        return stream_kind(method)(teacher, pool, method, parts.batches, seed, rank, device, run.first_batch)

    compiling, rows = run.trainer.compile, run.config.distill.batch_size
    graphs = compiling == "graphs"
    with (
        run.open(),
        compiled([teacher.network, trained.network], compiles(compiling, run.device)),
        replayed(teacher.network, rows_of(teacher, rows), graphs),
        replayed(trained.network, rows, graphs and _may_replay(run.trainer), trains=True),
    ):
        result = run.fit(parts.module(), stream_for, [pools, saving, grids], measuring)
        if is_first_rank():
            tidy(run.folder)
    return run.result(student, result)


def _may_replay(trainer: TrainerConfig) -> bool:
    """Whether no gradient is needed after its step, and none by another rank: they are in a graph's memory."""
    return trainer.ranks == trainer.accumulate == 1 and trainer.strategy in ("auto", "single_device")


def _check_teacher(parts: Distillation, run: Run) -> None:
    """The teacher check, unless it is switched off; one process checks for all."""
    if not run.config.teacher.check or not is_first_rank():
        return
    started = time.monotonic()
    try:
        figures = parts.teacher.to(run.device).check()
    except UserError as error:
        raise UserError(f"teacher: {error}; check=False (teacher.check=false in a config) skips this check") from error
    logger.info(
        f"teacher check: eps error {figures.linear:.2f} of a linear denoiser's at T/4, scale off by "
        f"{figures.deviation:.3f} at most ({time.monotonic() - started:.0f} s)"
    )


def _export(parts: Distillation, run: Run) -> Export:
    student = parts.student.changed(info={**parts.student.info, **teacher_facts(parts)})
    return exporting(student, run.folder, run.config.logging.export_dtype)


def teacher_facts(parts: Distillation) -> dict[str, Any]:
    """Name, SHA-256 and licence (as the user states it) of the teacher, and the recipe, for the student's card."""
    teacher, distill, trainer = parts.config.teacher, parts.config.distill, parts.config.trainer
    return {
        "teacher": teacher.ckpt,
        "teacher_sha256": teacher_hash(parts.teacher),
        "teacher_licence": teacher.licence or "not stated (teacher.licence)",
        **learned_guidance(parts.teacher),
        "method": f"DKDM, {distill.variant} iterative distillation",
        "batch_size": distill.batch_size * trainer.accumulate * trainer.ranks,
        "learning_rate": trainer.learning_rate,
        "ema_decay": trainer.ema_decay,
        **{key: value for key, value in parts.teacher.info.items() if key == "classes" and parts.student.classes},
    }
