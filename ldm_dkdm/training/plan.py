"""What a distillation will cost, before it starts."""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ldm_dkdm.config.schema import DistillRun, TrainerConfig
from ldm_dkdm.device import autocast, default_device
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.distillation.warmup import preparation, warmup_calls
from ldm_dkdm.networks.cost import gflops, parameters
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.reporting import duration, pace, size
from ldm_dkdm.sources import how_to_get
from ldm_dkdm.training.from_teacher import Parts, assemble, pool_bytes, student_module
from ldm_dkdm.training.saving import KEPT

TIMED_ITERATIONS = 3
MAX_TIMED_BATCH = 8  # the time of an iteration is scaled from this batch, or from a smaller one that
TIMING_SECONDS = 30  # takes about this long: a plan shall take seconds


def costs(config: DistillRun, parts: Parts) -> dict[str, str]:
    """The lines of a plan that need no measurement, in order: what is meant and how much."""
    shape, batch, iterations = parts.model.latent_shape, config.distill.batch_size, _iterations(config)
    devices, mapped = config.trainer.devices, config.distill.pool_storage == "mmap"
    pool, each = devices * pool_bytes(config, parts), f" on each of {devices} devices" if devices > 1 else ""
    source = config.distill.pool_from or preparation(config.distill).mode
    student, teacher = parameters(parts.student), parameters(parts.teacher.network)
    # student in float32: weights, gradients, two Adam moments, EMA; teacher and first stage: weights
    resident = 4 * (5 * student + teacher + parts.codec.parameters)
    device = default_device(config.trainer.accelerator)
    precision = {"bf16": "bf16 autocast", "32": "float32"}[parts.precision]
    return {
        "teacher": f"{teacher / 1e6:.6f} M parameters, {gflops(parts.teacher.network, shape):.2f} GFLOPs a sample",
        "student": f"{student / 1e6:.6f} M parameters, {gflops(parts.student, shape):.2f} GFLOPs a sample",
        "pool": f"{parts.slots:,} slots ({config.distill.variant}){each}, {size(pool)} of host "
        + ("disk, memory-mapped" if mapped else "memory"),
        "teacher calls, warm-up": f"{_warmup_samples(config, parts):,} samples ({source}){each}",
        "teacher calls, training": f"{iterations * batch:,} samples ({iterations:,} iterations of {batch}){each}",
        "memory, device": f"{size(resident)} on {device.type} and the activations of one batch ({precision})",
        "memory, host": size(0 if mapped else pool) + " for the pool",
        "disk": f"{size((KEPT + 1) * (pool + 16 * student) + 4 * student + mapped * pool)} for the student, {KEPT} "
        "checkpoints and the next one while it is written" + (", the mapped pool" if mapped else ""),
    }


def _iterations(config: DistillRun) -> int:
    """Of the whole run, with those that the student does not see."""
    return round(config.trainer.max_steps * config.trainer.accumulate / (1 - config.distill.discard))


def _warmup_samples(config: DistillRun, parts: Parts) -> int:
    """That the teacher computes before the training."""
    if config.distill.pool_from:
        return 0
    return warmup_calls(preparation(config.distill), parts.slots, parts.schedule.num_timesteps)


def time_needed(config: DistillRun, parts: Parts) -> str:
    """How long the run will take, from a few timed iterations."""
    steps, batch, warm = config.trainer.max_steps, config.distill.batch_size, _warmup_samples(config, parts)
    batches = steps * config.trainer.accumulate
    trial = time_iteration(config, parts, 1, 1)  # also warms the machine up
    timed = max(1, min(batch, MAX_TIMED_BATCH, int(TIMING_SECONDS / (TIMED_ITERATIONS * trial[0] / batch))))
    seconds, teacher_seconds = time_iteration(config, parts, timed, TIMED_ITERATIONS)
    training = batches * seconds + (_iterations(config) - batches) * batch * teacher_seconds
    limit = 60 * (config.trainer.max_minutes or math.inf)
    eta = min(training, limit) + warm * teacher_seconds
    ends = f", trainer.max_minutes ends it at step {int(steps * limit / training):,}" if limit < training else ""
    return (
        f"about {duration(eta)}: {pace(seconds)} an iteration, {duration(warm * teacher_seconds)} of warm-up{ends} "
        f"(from {TIMED_ITERATIONS} timed iterations of {timed} sample{'s' if timed > 1 else ''})"
    )


def time_iteration(config: DistillRun, parts: Parts, batch: int, iterations: int) -> tuple[float, float]:
    """Seconds of one training iteration at the configured batch, and of one teacher sample; timed at `batch`."""
    device = default_device(config.trainer.accelerator)
    labels = parts.teacher.draw_labels(batch, torch.Generator().manual_seed(0))
    pool = NoisyPool(batch, parts.model.latent_shape, labeled=labels is not None)
    pool.fill(NoisyBatch(torch.randn(pool.x.shape), torch.randint(parts.schedule.num_timesteps, (batch,)), labels))
    timed = replace(config.distill, batch_size=batch, discard=0.0)
    stream = DistillStream(parts.teacher.to(device), pool, timed, iterations, device=device)
    trainer = TrainerConfig(max_steps=1, learning_rate=1e-9)
    module = student_module(config, parts, trainer).to(device)
    module.log = lambda *args, **kwargs: None  # no trainer is attached
    optimizer = module.configure_optimizers()["optimizer"]
    times, teacher_times, updates = [], [], []
    for _ in range(iterations):
        started = time.perf_counter()
        example = stream.next_batch()
        _synchronise(device)
        teacher_times.append(time.perf_counter() - started)
        with autocast(parts.precision, device):
            loss = module.training_step(example, 0)
        loss.backward()
        _synchronise(device)
        times.append(time.perf_counter() - started)
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(device)
        updates.append(time.perf_counter() - started - times[-1])
    scale = config.distill.batch_size / batch  # of all but the update
    return min(times) * scale + min(updates), min(teacher_times) / batch


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_plan(config: DistillRun) -> None:
    """Print the plan of a configuration, one line a subject."""
    parts = assemble(config, planning=True)
    if not Path(config.teacher.ckpt).exists():
        print(f"{config.teacher.ckpt} is missing: planned with random weights; {how_to_get(Path(config.teacher.ckpt))}")
    lines = costs(config, parts)
    width = max(map(len, lines))
    for subject, value in lines.items():
        print(f"{subject:<{width}}  {value}", flush=True)
    print("timing a few iterations on this machine ...", file=sys.stderr)
    print(f"{'time':<{width}}  {time_needed(config, parts)}")
