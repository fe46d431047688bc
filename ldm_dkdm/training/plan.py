"""Estimate the cost of a distillation before it starts."""

import math
from dataclasses import replace

import torch

from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.device import default_device
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.distillation.warmup import preparation, warmup_calls
from ldm_dkdm.evaluation.reference import teacher_calls
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks.cost import gflops, parameters
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import duration, pace, size
from ldm_dkdm.training.parts import Distillation
from ldm_dkdm.training.room import disk_needed
from ldm_dkdm.training.saving import KEPT
from ldm_dkdm.training.timing import TIMED_ITERATIONS, time_iterations, timed_batch, timed_with


def costs(parts: Distillation) -> dict[str, str]:
    """The lines of a plan that need no timing, in order: quantity -> amount."""
    config = parts.config
    batch, iterations = config.distill.batch_size, _iterations(config)
    devices, mapped = config.trainer.devices, config.distill.pool_storage == "mmap"
    pool, each = devices * parts.pool_bytes, f" on each of {devices} devices" if devices > 1 else ""
    disk = disk_needed(parts.student.parameters, config.trainer, config.logging, pool, mapped * pool)
    source = config.distill.pool_from or preparation(config.distill).mode
    student, teacher = parts.student.parameters, parts.teacher.parameters
    # student in float32: weights, gradients, two Adam moments, EMA; teacher and first stage: weights
    resident = 4 * (5 * student + teacher + codec_parameters(parts.teacher))
    device = default_device(config.trainer.accelerator)
    precision = {"bf16": "bf16 autocast", "32": "float32"}[parts.teacher.precision]
    return {
        "teacher": network_cost(parts.teacher),
        "student": network_cost(parts.student),
        "pool": f"{parts.slots:,} slots ({config.distill.variant}){each}, {size(pool)} of host "
        + ("disk, memory-mapped" if mapped else "memory"),
        "teacher calls, warm-up": f"{_warmup_samples(parts):,} samples ({source}){each}",
        "teacher calls, training": f"{iterations * batch:,} samples ({iterations:,} iterations of {batch}){each}",
        "teacher calls, agreement": f"{_agreement_samples(parts):,} samples, once",
        "memory, device": f"{size(resident)} on {device.type} and the activations of one batch ({precision})",
        "memory, host": size(0 if mapped else pool) + " for the pool",
        "disk": f"{size(disk)} for the student, {KEPT} "
        "checkpoints and the next one while it is written" + (", the mapped pool" if mapped else ""),
    }


def network_cost(model: DiffusionModel) -> str:
    """Parameters, and operations of one call, for a plan."""
    operations = gflops(model.network, model.shape, model.num_classes is not None)
    return f"{model.parameters / 1e6:.6f} M parameters, {operations:.2f} GFLOPs a sample"


def _iterations(config: DistillRun) -> int:
    """Iterations of the whole run, with those that the student does not see."""
    return round(config.trainer.max_steps * config.trainer.accumulate / (1 - config.distill.discard))


def _warmup_samples(parts: Distillation) -> int:
    """Teacher evaluations of one sample before the training."""
    method = parts.config.distill
    return 0 if method.pool_from else warmup_calls(preparation(method), parts.slots, parts.teacher.schedule)


def _agreement_samples(parts: Distillation) -> int:
    """Teacher evaluations of one sample for measurements during the training."""
    steps, every = parts.config.trainer.max_steps, parts.config.logging.measure_every
    return teacher_calls(parts.teacher.schedule.num_timesteps) if 0 < every <= steps else 0


def codec_parameters(model: DiffusionModel) -> int:
    """Parameters of the first stage; a missing one is counted without allocating it."""
    stage = model.first_stage
    if stage is None or stage.path.exists():
        return model.codec().parameters
    if stage.target is None:
        return 0
    with torch.device("meta"):
        return parameters(build(stage, FIRST_STAGES, "first_stage.params"))


def time_needed(parts: Distillation) -> str:
    """How long the run will take, from a few timed iterations."""
    config, warm = parts.config, _warmup_samples(parts)
    steps, batch, batches = config.trainer.max_steps, config.distill.batch_size, parts.batches
    timed = timed_batch(batch, time_iteration(parts, 1, 1)[0] / batch)  # the trial also warms the machine up
    seconds, teacher_seconds = time_iteration(parts, timed, TIMED_ITERATIONS)
    training = batches * seconds + (_iterations(config) - batches) * batch * teacher_seconds
    limit = 60 * (config.trainer.max_minutes or math.inf)
    eta = min(training, limit) + (warm + _agreement_samples(parts)) * teacher_seconds
    ends = f", trainer.max_minutes ends it at step {int(steps * limit / training):,}" if limit < training else ""
    return (
        f"about {duration(eta)}: {pace(seconds)} an iteration, {duration(warm * teacher_seconds)} of warm-up{ends} "
        + timed_with(timed)
    )


def time_iteration(parts: Distillation, batch: int, iterations: int) -> tuple[float, float]:
    """Seconds of one training iteration at the configured batch, and of one teacher sample; timed at `batch`."""
    config, teacher = parts.config, parts.teacher
    device = default_device(config.trainer.accelerator)
    labels = teacher.draw_labels(batch, torch.Generator().manual_seed(0))
    pool = NoisyPool(batch, teacher.shape, labeled=labels is not None)
    t = torch.randint(teacher.schedule.num_timesteps, (batch,))
    pool.fill(NoisyBatch(torch.randn(pool.x.shape), t, labels))
    timed = replace(config.distill, batch_size=batch, discard=0.0)
    stream = DistillStream(teacher.to(device), pool, timed, iterations, device=device)
    student = parts.student.changed(precision=teacher.precision)
    times = time_iterations(student, config.distill.loss, stream.next_batch, device, iterations)
    return times.iteration(config.distill.batch_size / batch), times.batch / batch
