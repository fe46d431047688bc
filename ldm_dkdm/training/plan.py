"""Estimate the cost of a distillation before it starts."""

import math
from dataclasses import replace

import torch

from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import TrainerConfig
from ldm_dkdm.device import default_device
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.replay import calls_for
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.distillation.warmup import preparation
from ldm_dkdm.evaluation.agreement import teacher_calls
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks.cost import gflops, parameters
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import duration, pace, size
from ldm_dkdm.training.ends import ended_early
from ldm_dkdm.training.parts import Distillation
from ldm_dkdm.training.room import disk_needed
from ldm_dkdm.training.saving import KEPT
from ldm_dkdm.training.several import on_each, sharded_memory, traffic, training_bytes, without_traffic
from ldm_dkdm.training.timing import TIMED_ITERATIONS, time_iterations, timed_batch, timed_with
from ldm_dkdm.training.warmup_shares import PoolWarmup


def costs(parts: Distillation) -> dict[str, str]:
    """The lines of a plan that need no timing, in order: quantity -> amount."""
    config = parts.config
    batch, iterations = config.distill.batch_size, _iterations(parts)
    trainer, device = config.trainer, default_device(config.trainer.accelerator)
    place = parts.pool_place(device)
    mapped = place == "mmap"
    pools, each = parts.all_pool_bytes, on_each(trainer)
    files = pools + trainer.ranks * parts.replay_bytes
    disk = disk_needed(parts.student.parameters, trainer, config.logging, files, mapped * pools)
    source = config.distill.pool_from or preparation(config.distill).mode
    student, teacher = parts.student.parameters, parts.teacher.parameters
    # weights of the teacher (bf16 halves it) and the first stage
    own = 2 if parts.teacher.precision == "bf16" else 4
    resident = training_bytes(student, trainer, device) + own * teacher + 4 * codec_parameters(parts.teacher)
    precision = {"bf16": "bf16 autocast", "32": "float32"}[parts.teacher.precision]
    resident += parts.replay_bytes + (parts.pool_bytes if place == "device" else 0)
    unit = "iterations" if config.distill.replay == 1 else "calls"
    warmup = _warmup_samples(parts)
    rest = ", what is left" if any(one.filled for one in parts.warmups) else ""
    left = f"steps {parts.done:,} to {trainer.max_steps:,}: the calls and the time below are those that are left"
    return {
        **({"resumed": left} if parts.done else {}),
        "teacher": network_cost(parts.teacher),
        "student": network_cost(parts.student),
        "pool": f"{parts.own_slots:,} slots ({config.distill.variant}){each}, {size(pools)} of "
        + {"mmap": "host disk, memory-mapped", "device": f"{device.type} memory"}.get(place, "host memory"),
        "teacher calls, warm-up": f"{warmup:,} samples ({source}{rest}){each}",
        "teacher calls, training": f"{iterations * batch:,} samples ({iterations:,} {unit} of {batch}){each}",
        "teacher calls, agreement": f"{_agreement_samples(parts):,} samples, once",
        "memory, device": f"{size(resident)} on {device.type} and the activations of one batch ({precision})",
        "memory, host": "; ".join([_pool_memory(parts, place), *sharded_memory(student, trainer, device)]),
        **traffic(student, trainer),
        "disk": f"{size(disk)} for the student, {KEPT} "
        "checkpoints and the next one while it is written" + (", the mapped pool" if mapped else ""),
    }


def _pool_memory(parts: Distillation, place: str) -> str:
    """Host memory of a machine for pools, which pass through it when they are saved."""
    trainer = parts.config.trainer
    pools = 0 if place == "mmap" else trainer.per_node * parts.pool_bytes
    what = "for the pool" if trainer.ranks == 1 else "for the pools, on each machine"
    if place == "device":
        what += ", while it is saved" if trainer.ranks == 1 else ", while they are saved"
    return f"{size(pools)} {what}"


def network_cost(model: DiffusionModel) -> str:
    """Parameters, and operations of one call, for a plan."""
    operations = gflops(model.network, model.shape, model.num_classes is not None)
    return f"{model.parameters / 1e6:.6f} M parameters, {operations:.2f} GFLOPs a sample"


def _iterations(parts: Distillation) -> int:
    """Teacher calls that are left, with those that the student does not see."""
    method, done = parts.config.distill, parts.done * parts.config.trainer.accumulate
    calls = calls_for(parts.batches, method.replay) - calls_for(done, method.replay)
    return round(calls / (1 - method.discard))


def _batches(parts: Distillation) -> int:
    """Batches that the student is still to see."""
    return parts.batches - parts.done * parts.config.trainer.accumulate


def _warmup_samples(parts: Distillation) -> int:
    """Teacher evaluations of one sample before the training, of the rank that has the most warm-ups."""
    method, ranks = parts.config.distill, parts.config.trainer.ranks
    if method.pool_from or parts.done:
        return 0
    warmups = parts.warmups or [PoolWarmup(0, ranks, parts.slots)]
    left = [one.calls_left(method, parts.teacher.schedule, parts.config.trainer.seed) for one in warmups]
    return max(sum(left[rank::ranks]) for rank in range(ranks))


def _agreement_samples(parts: Distillation) -> int:
    """Teacher evaluations of one sample for measurements during the training."""
    steps, every = parts.config.trainer.max_steps, parts.config.logging.measure_every
    measured = 0 < every <= steps and not parts.done
    return teacher_calls(parts.teacher.schedule.num_timesteps) if measured else 0


def codec_parameters(model: DiffusionModel) -> int:
    """Parameters of the first stage; a missing one is counted without allocating it."""
    stage = model.first_stage
    if stage is None or stage.path.exists():
        return model.codec().parameters
    if stage.target is None:
        return 0
    with torch.device("meta"):
        return parameters(build(stage, FIRST_STAGES, "first_stage.params"))


def time_needed(parts: Distillation) -> dict[str, str]:
    """The lines of a plan about time, from a few timed iterations."""
    config, warm = parts.config, _warmup_samples(parts)
    batch, batches = config.distill.batch_size, _batches(parts)
    timed = timed_batch(batch, time_iteration(parts, 1, 1)[0] / batch)  # the trial also warms the machine up
    seconds, teacher_seconds = time_iteration(parts, timed, TIMED_ITERATIONS)
    training = batches * seconds + (_iterations(parts) - batches) * batch * teacher_seconds
    limit = 60 * (config.trainer.max_minutes or math.inf) - parts.spent
    eta = min(training, limit) + (warm + _agreement_samples(parts)) * teacher_seconds
    warming = f"{duration(warm * teacher_seconds)} of warm-up {timed_with(timed)}"
    needed = f"about {duration(eta)}{on_each(config.trainer)}: {pace(seconds)} an iteration, {warming}"
    needed += without_traffic(config.trainer)
    return {"time": needed, **early(config.trainer, training, parts.done, parts.spent)}


def early(config: TrainerConfig, seconds: float, done: int = 0, spent: float = 0.0) -> dict[str, str]:
    """A line of a plan about max_minutes, if it shortens a training that would take these seconds.

    Args:
        done, spent: steps of an earlier part of the run, and the seconds of the limit that they took.
    """
    if config.max_minutes is None or 60 * config.max_minutes - spent >= seconds:
        return {}
    reached = done + int((config.max_steps - done) * (60 * config.max_minutes - spent) / seconds)
    used = f", {duration(spent)} of it are used" if spent else ""
    return {"early end": ended_early(config.max_minutes, reached, config.max_steps) + used}


def time_iteration(parts: Distillation, batch: int, iterations: int) -> tuple[float, float]:
    """Seconds of one training iteration at the configured batch, and of one teacher sample; timed at `batch`."""
    config, teacher = parts.config, parts.teacher
    device = default_device(config.trainer.accelerator)
    labels = teacher.draw_labels(batch, torch.Generator().manual_seed(0))
    pool = NoisyPool(batch, teacher.shape, labeled=labels is not None)
    t = torch.randint(teacher.schedule.num_timesteps, (batch,), device="cpu")
    pool.fill(NoisyBatch(torch.randn(pool.x.shape, dtype=torch.float32, device="cpu"), t, labels))
    timed = replace(config.distill, batch_size=batch, discard=0.0)
    stream = DistillStream(teacher.to(device), pool, timed, iterations, device=device)
    student = parts.student.changed(precision=teacher.precision)
    times = time_iterations(student, config.distill.loss, stream.next_batch, device, iterations)
    return times.iteration(config.distill.batch_size / batch), times.batch / batch
