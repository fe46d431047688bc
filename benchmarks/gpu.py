"""What the performance page says of a card, in one command: python benchmarks/gpu.py -o gpu.json

For every recipe: seconds of a distillation step by variant, which take turns in one run, with the share of a matrix
product's speed that the step reaches (model FLOP utilisation; the product is measured in the same run); the same with
the pool on the device and in host memory; images a second of teacher and student. It has run on a CPU only,
where small numbers are needed: `--batch_size 4 --rounds 2 --images 4`.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Pair, finish, guarded, interleaved, machine, open_pair, synchronise, table
from training_speed import BATCHES, Training

from ldm_dkdm import DiffusionModel
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.device import compiles
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.networks.cost import gflops
from ldm_dkdm.networks.modes import stored_in_bf16
from ldm_dkdm.records import NoisyBatch

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating point operations a second of a large matrix product."""
    side = SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(5):
            a @ b
        synchronise(device)
        count += 5
    return count * 2 * side**3 / (time.perf_counter() - started)


def stream_of(pair: Pair, batch_size: int, place: torch.device) -> DistillStream:
    """A distillation's stream with its pool on a device; the pool's size does not change the time of a step."""
    teacher, slots = pair.teacher, 8 * batch_size
    labels = teacher.draw_labels(slots, torch.Generator(pair.device).manual_seed(0))
    dtype = getattr(torch, pair.config.distill.pool_dtype)
    pool = NoisyPool(slots, teacher.shape, dtype, labeled=labels is not None, device=place)
    t = torch.randint(teacher.schedule.num_timesteps, (slots,))
    pool.fill(NoisyBatch(torch.randn(slots, *teacher.shape), t, labels))
    config = replace(pair.config.distill, batch_size=batch_size)
    return DistillStream(teacher, pool, config, BATCHES, device=pair.device)


def step_flops(pair: Pair, batch_size: int) -> float:
    """Operations of one step: the teacher forward, the student forward and backward (twice the forward)."""
    labelled = pair.teacher.num_classes is not None
    teacher, student = (gflops(model.network, model.shape, labelled) for model in (pair.teacher, pair.student))
    return 1e9 * batch_size * (teacher + 3 * student)


def variants(recipe: str, batch_size: int, compiling: bool) -> dict[str, tuple[Pair, Training]]:
    """Ways to make the same step: name -> models and training."""
    ways: dict[str, tuple[str, bool, bool, str]] = {  # precision, bf16 weights, compiled, place of the pool
        "float32": ("32", False, False, "device"),
        "bf16": ("bf16", False, False, "device"),
        "bf16, teacher stored in bf16": ("bf16", True, False, "device"),
        "as shipped, pool in host memory": ("bf16", True, compiling, "cpu"),
        "as shipped": ("bf16", True, compiling, "device"),
    }
    found = {}
    for name, (precision, small, compiled, place) in ways.items():
        pair = open_pair(recipe, precision=precision)
        if small:
            pair.teacher.network = stored_in_bf16(pair.teacher.network)
        where = pair.device if place == "device" else torch.device("cpu")
        training = Training(pair, stream_of(pair, batch_size, where))
        for network in (pair.teacher.network, training.module.network) if compiled else ():
            network.compile(dynamic=False)
        found[name] = (pair, training)
    return found


def steps(recipe: str, batch_size: int | None, rounds: int, compiling: bool, peaks: dict[str, float]) -> list[dict]:
    """A row for every variant of a recipe's step."""
    size = batch_size or open_pair(recipe).config.distill.batch_size
    made = variants(recipe, size, compiling)
    pair = next(iter(made.values()))[0]
    started = time.perf_counter()
    seconds = interleaved({name: training.iteration for name, (_, training) in made.items()}, rounds, pair.device)
    spent = time.perf_counter() - started
    rows = []
    for name, needed in seconds.items():
        peak = peaks[made[name][0].teacher.precision]
        share = step_flops(pair, size) / needed / peak
        rows.append({"recipe": recipe, "batch": size, "variant": name, "ms a step": 1e3 * needed, "MFU": share})
    print(f"{recipe}: {spent:.0f} s with compiling and {rounds} rounds", flush=True)
    return rows


def images_per_second(model: DiffusionModel, count: int, sampling_steps: int) -> float:
    """Speed of DDIM with decoding, after a batch that is not counted."""
    config = SamplingConfig(count, count, 0, sampling_steps)
    for _ in range(2):
        synchronise(model.device)
        started = time.perf_counter()
        for batch in model.sample_batches(config):
            batch.images.cpu()
        seconds = time.perf_counter() - started
    return count / seconds


def sampling(recipe: str, count: int, sampling_steps: int) -> dict[str, Any]:
    """Images a second of a recipe's teacher and student (Fig. 6 has 256 images)."""
    pair = open_pair(recipe)
    pair.teacher._codec = pair.student._codec = pair.codec if pair.teacher.space.encoded else pair.teacher._codec
    found = {
        f"{who}, images/s": images_per_second(model, count, sampling_steps)
        for who, model in (("teacher", pair.teacher), ("student", pair.student))
    }
    return {"recipe": recipe, "images": count, "steps": sampling_steps, **found}


def main() -> None:
    """Measure every recipe; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["ffhq256", "cifar10", "quickstart"])
    parser.add_argument("--batch_size", type=int, help="default: the recipe's")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each variant")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("-c", "--steps", type=int, default=20, help="DDIM steps of the sampling")
    parser.add_argument("--compile", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    options = parser.parse_args()
    device = open_pair("quickstart").device
    compiling = compiles(options.compile, device)
    peaks = {"bf16": peak_flops(device, torch.bfloat16), "32": peak_flops(device, torch.float32)}
    print(f"{machine(device)}, matrix products: " + ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in peaks.items()))
    rows, speeds = [], []
    for recipe in options.recipes:
        rows += steps(recipe, options.batch_size, options.rounds, compiling, peaks)
        speeds.append(sampling(recipe, options.images, options.steps))
    print(table(speeds))
    facts = {"what": "steps and sampling on a device", "compiled": compiling, "rounds": options.rounds}
    finish(options.out, device, rows, **facts, peak_flops=peaks, sampling=speeds)


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
