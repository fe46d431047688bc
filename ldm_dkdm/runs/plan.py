"""What a distillation will cost, before it starts."""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_dkdm.distill.pool import NoisyPool, slot_bytes
from ldm_dkdm.distill.stream import DistillStream
from ldm_dkdm.distill.warmup import preparation, warmup_calls
from ldm_dkdm.precision import autocast
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.runs.distill import Parts, assemble, student_module
from ldm_dkdm.runs.loop import default_device
from ldm_dkdm.runs.saving import KEPT
from ldm_dkdm.schema import DistillRun, TrainerConfig
from ldm_dkdm.sources import how_to_get

TIMED_ITERATIONS = 3
MAX_TIMED_BATCH = 8  # a plan shall take seconds: the time of an iteration is scaled from this batch


def gflops(network: nn.Module, shape: tuple[int, int, int]) -> float:
    """GFLOPs (multiplications and additions) of one forward pass of one sample of (C,H,W)."""
    device = next(network.parameters()).device
    label = None if network.num_classes is None else torch.zeros(1, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape, device=device), torch.zeros(1, device=device), label)
    return counter.get_total_flops() / 1e9


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


def plan(config: DistillRun, parts: Parts) -> dict[str, str]:
    """The lines of a plan, in order: what is meant and how much."""
    shape = parts.model.latent_shape
    steps, batch = config.trainer.max_steps, config.distill.batch_size
    batches = steps * config.trainer.accumulate
    iterations = round(batches / (1 - config.distill.discard))  # with those that the student does not see
    dtype, labeled = getattr(torch, config.distill.pool_dtype), parts.teacher.num_classes is not None
    pool_bytes = parts.slots * slot_bytes(shape, dtype, labeled)
    warm, source = warmup_calls(preparation(config.distill), parts.slots, parts.schedule.num_timesteps), None
    if config.distill.pool_from:
        warm, source = 0, config.distill.pool_from
    student, teacher = parameters(parts.student), parameters(parts.teacher.network)
    # student in float32: weights, gradients, two Adam moments, EMA; teacher and first stage: weights
    resident = 4 * (5 * student + teacher + parts.codec.parameters)
    device = default_device(config.trainer.accelerator)
    seconds, teacher_seconds = time_iteration(config, parts)
    training = batches * seconds + (iterations - batches) * batch * teacher_seconds
    limit = 60 * (config.trainer.max_minutes or math.inf)
    eta = min(training, limit) + warm * teacher_seconds
    return {
        "teacher": f"{teacher / 1e6:.6f} M parameters, {gflops(parts.teacher.network, shape):.2f} GFLOPs a sample",
        "student": f"{student / 1e6:.6f} M parameters, {gflops(parts.student, shape):.2f} GFLOPs a sample",
        "pool": f"{parts.slots:,} slots ({config.distill.variant}), {size(pool_bytes)} of host "
        + ("disk, memory-mapped" if config.distill.pool_storage == "mmap" else "memory"),
        "teacher calls, warm-up": f"{warm:,} samples ({source or preparation(config.distill).mode})",
        "teacher calls, training": f"{iterations * batch:,} samples ({iterations:,} iterations of {batch})",
        "memory, device": f"{size(resident)} on {device.type} and the activations of one batch ({parts.precision})",
        "memory, host": size(0 if config.distill.pool_storage == "mmap" else pool_bytes) + " for the pool",
        "disk": f"{size((KEPT + 1) * (pool_bytes + 16 * student) + 4 * student)} for the student, {KEPT} checkpoints "
        "and the next one while it is written",
        "time": f"about {duration(eta)}: {seconds:.2f} s an iteration, {duration(warm * teacher_seconds)} of warm-up"
        + (f", trainer.max_minutes ends it at step {int(steps * limit / training):,}" if limit < training else "")
        + " "
        f"(from {TIMED_ITERATIONS} timed iterations at batch {min(batch, MAX_TIMED_BATCH)})",
    }


def time_iteration(config: DistillRun, parts: Parts) -> tuple[float, float]:
    """Seconds of one training iteration at the configured batch, and of one teacher sample."""
    device = default_device(config.trainer.accelerator)
    batch = min(config.distill.batch_size, MAX_TIMED_BATCH)
    labels = parts.teacher.draw_labels(batch, torch.Generator().manual_seed(0))
    pool = NoisyPool(batch, parts.model.latent_shape, labeled=labels is not None)
    pool.fill(NoisyBatch(torch.randn(pool.x.shape), torch.randint(parts.schedule.num_timesteps, (batch,)), labels))
    timed = replace(config.distill, batch_size=batch, discard=0.0)
    stream = DistillStream(parts.teacher.to(device), pool, timed, TIMED_ITERATIONS + 1, device=device)
    trainer = TrainerConfig(max_steps=1, learning_rate=1e-9)
    module = student_module(config, parts, trainer).to(device)
    module.log = lambda *args, **kwargs: None  # no trainer is attached
    optimizer = module.configure_optimizers()["optimizer"]
    times, teacher_times = [], []
    for _ in range(TIMED_ITERATIONS + 1):
        started = time.perf_counter()
        example = stream.next_batch()
        _synchronise(device)
        teacher_times.append(time.perf_counter() - started)
        with autocast(parts.precision, device):
            loss = module.training_step(example, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(device)
        times.append(time.perf_counter() - started)
    scale = config.distill.batch_size / batch
    return min(times[1:]) * scale, min(teacher_times[1:]) / batch


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_plan(config: DistillRun) -> None:
    """Print the plan of a configuration, one line a subject."""
    lines = plan(config, assemble(config, planning=True))
    if not Path(config.teacher.ckpt).exists():
        print(f"{config.teacher.ckpt} is missing: planned with random weights; {how_to_get(Path(config.teacher.ckpt))}")
    width = max(map(len, lines))
    for subject, value in lines.items():
        print(f"{subject:<{width}}  {value}")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """A time span for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
