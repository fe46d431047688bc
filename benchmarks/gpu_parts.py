"""What benchmarks/gpu.py measures besides steps: memory, sampling, and what storing weights in bf16 changes."""

import gc
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from common import Pair
from gpu_steps import Training, as_shipped, at, shipped_step, stream_of, synchronise
from step_profile import REST, kind_of
from torch.profiler import ProfilerActivity, profile
from training_speed import encoded, on_data

from ldm_dkdm import DiffusionModel
from ldm_dkdm.config.recipes import find_shipped
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.pool import pool_slots
from ldm_dkdm.model.filling import filled

Tables = dict[str, list[dict[str, Any]]]  # name -> rows
STEPS = 3  # before memory is read or kernels are timed
KERNELS = {  # kind -> parts of its kernels' names; the first kind that has one counts
    "compiled: norms, activations, sums, casts": ("triton",),  # their names list what they replace
    "changes of layout": ("nchwtonhwc", "nhwctonchw"),
    "attention": ("flash", "fmha", "attention"),
    "convolutions": ("convolution", "conv2d", "fprop", "dgrad", "wgrad", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "addmm", "::mm", "bmm"),
    "optimizer and average": ("multi_tensor", "adamw", "lerp"),
    "copies": ("memcpy", "memset", "copy"),
}
BINS = 10  # of t


def memory(recipe: str, pair: Pair, batch_size: int, rhos: list[float]) -> Tables:
    """Peak of the device's memory against rho (Fig. 7), with the pool on the device and in host memory, and on data."""
    shipped = as_shipped(pair)
    on_images = _peak(shipped, DataStream(encoded(shipped), **on_data(shipped, batch_size)))
    rows = [{"recipe": recipe, "rho": "on data", "pool GB": 0.0, "on the device": on_images, "in host memory": ""}]
    for rho in rhos:
        slots = pool_slots(rho, pair.teacher.schedule.num_timesteps, batch_size)
        row: dict[str, Any] = {"recipe": recipe, "rho": rho}
        for name, place in (("on the device", pair.device), ("in host memory", torch.device("cpu"))):
            stream = stream_of(shipped, batch_size, place, slots)
            row["pool GB"] = stream.pool.x.nbytes / 1e9
            row[name] = _peak(shipped, stream)
            del stream
        rows.append(row)
    return {"memory": rows}


def _peak(pair: Pair, stream: Any) -> float:
    """GB that the device has held at most in a few steps; 0 on a CPU."""
    gc.collect()  # what was measured before has cycles
    if pair.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    training = Training(pair, stream)
    for _ in range(STEPS):
        training.iteration()
    return torch.cuda.max_memory_allocated() / 1e9 if pair.device.type == "cuda" else 0.0


def sampling(recipe: str, pair: Pair, count: int, steps: int) -> Tables:
    """Images a second of a recipe's teacher and student, with decoding (Fig. 6 has 256 images)."""
    shared = at(pair, resolve_precision("auto", pair.device))
    models = {"teacher": shared.teacher, "student": shared.student}
    for model in models.values():
        model._codec = pair.codec
    speeds = {f"{who}, images/s": images_per_second(model, count, steps) for who, model in models.items()}
    return {"sampling": [{"recipe": recipe, "images": count, "steps": steps, **speeds}]}


def images_per_second(model: DiffusionModel, count: int, steps: int) -> float:
    """Speed of DDIM with decoding, in batches that fill a GPU, after one of two steps that is not counted."""
    config = filled(model, SamplingConfig(count, seed=0, steps=steps))
    first = replace(config, count=config.batch_size, steps=2)
    for each in (first, config):
        synchronise(model.device)
        started = time.perf_counter()
        for _ in model.sample_batches(each):
            pass  # its images are on the host
        seconds = time.perf_counter() - started
    return count / seconds


def bf16_error(recipe: str, pair: Pair, count: int) -> Tables:
    """Error of the teacher's eps in bf16 against float32 in every tenth of t, relative to its root mean square.

    At samples of the teacher, noised to random t of the tenth. Random weights say nothing: there are no rows without a
    checkpoint.
    """
    if not find_shipped(pair.config.teacher.ckpt).exists():
        return {}
    teacher, schedule = pair.teacher, pair.teacher.schedule
    ways = {"bf16 autocast": at(pair, "bf16").teacher, "weights stored in bf16": at(pair, "bf16", True).teacher}
    x_0 = torch.cat([batch.states for batch in teacher.sample_batches(SamplingConfig(count, count, 0, 10))])
    numbers = torch.Generator(pair.device).manual_seed(0)
    rows, T = [], schedule.num_timesteps
    for part in range(BINS):
        low, high = part * T // BINS, max((part + 1) * T // BINS, part * T // BINS + 1)
        t = torch.randint(low, high, (count,), generator=numbers, device=pair.device)
        x_t = q_sample(schedule, x_0, t, torch.randn(x_0.shape, generator=numbers, device=pair.device))
        label = teacher.draw_labels(count, numbers)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = teacher.predict(x_t, t, label).eps
        errors = {name: _relative(way.predict(x_t, t, label).eps, exact) for name, way in ways.items()}
        rows.append({"recipe": recipe, "t": f"{low} to {high - 1}", **errors})
    return {"bf16": rows}


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def kernels(recipe: str, pair: Pair, batch_size: int, compiling: bool) -> Tables:
    """Milliseconds that the device computes in a step as shipped, by kind of kernel."""
    training = shipped_step(pair, batch_size, compiling)
    for _ in range(STEPS):
        training.iteration()
    on_gpu = pair.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watched:
        for _ in range(STEPS):
            training.iteration()
        synchronise(pair.device)
    spent: Counter[str] = Counter()
    for event in watched.key_averages():
        if event.is_user_annotation:
            continue  # a span of others
        spent[kind_of(event.key, KERNELS)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = spent.total()
    rows = [
        {"recipe": recipe, "kind": kind, "ms a step": spent[kind] / STEPS / 1e3, "share": spent[kind] / total}
        for kind in (*KERNELS, REST)
        if spent[kind]
    ]
    return {"kernels": rows}
