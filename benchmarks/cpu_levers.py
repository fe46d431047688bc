"""What makes a distillation step faster on a CPU, and what does not: python benchmarks/cpu_levers.py quickstart

Each lever changes one thing of the step as it is shipped; all take turns in one run. The table has samples a second,
their ratio to the shipped step, the share of the speed of a matrix product in the shipped step's precision (same run),
and the seconds that compiling took, which a run has to win back.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import finish, guarded, interleaved, open_pair
from gpu_steps import peak_flops, step_flops, stream_of
from training_speed import Training

from ldm_dkdm.device import default_device
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks import layers
from ldm_dkdm.networks.modes import stored_in_bf16


@dataclass(frozen=True)
class Lever:
    """One change to the shipped step: bf16 where it is fast, also of the teacher's weights, and all threads."""

    precision: str = "auto"
    stored: bool = True
    batches: int = 1  # times the recipe's batch size
    compiled: bool = False
    channels_last: bool = False
    flash: bool = False  # torch's fused attention where the shipped step multiplies matrices
    threads: int | None = None
    replay: int = 1  # batches that each of the teacher's predictions serves
    stratified: bool = False


LEVERS = {
    "as shipped": Lever(),
    "float32": Lever(precision="32", stored=False),
    "teacher not stored in bf16": Lever(stored=False),
    "twice the batch": Lever(batches=2),
    "four times the batch": Lever(batches=4),
    "compiled": Lever(compiled=True),
    "channels_last": Lever(channels_last=True),
    "fused attention": Lever(flash=True),
    "one thread": Lever(threads=1),
    "replay: 2": Lever(replay=2),
    "replay: 4": Lever(replay=4),
    "draws: stratified": Lever(stratified=True),
}


class Variant:
    """A training with a lever."""

    def __init__(self, recipe: str, lever: Lever) -> None:
        self.lever = lever
        pair = open_pair(recipe, precision=lever.precision)
        self.size = lever.batches * pair.config.distill.batch_size
        self.flops = step_flops(pair, self.size, lever.replay)
        if lever.stored and pair.teacher.precision == "bf16":
            pair.teacher.network = stored_in_bf16(pair.teacher.network)
        draws = "stratified" if lever.stratified else pair.config.distill.draws
        stream = stream_of(pair, self.size, pair.device, replay=lever.replay, draws=draws)
        self.training = Training(pair, stream)
        networks = (pair.teacher.network, self.training.module.network)
        self.compiling = 0.0
        for network in networks:
            if lever.channels_last:
                network.to(memory_format=torch.channels_last)
                self.training.follow()
            if lever.compiled:
                network.compile(dynamic=False)
        if lever.compiled:
            started = time.perf_counter()
            self.step()
            self.compiling = time.perf_counter() - started

    def step(self) -> None:
        """One iteration, or as many as one call of the teacher serves."""
        with arithmetic(self.lever):
            for _ in range(self.lever.replay):
                self.training.iteration()


@contextmanager
def arithmetic(lever: Lever) -> Iterator[None]:
    """Threads and attention as a lever asks for."""
    threads, tokens = torch.get_num_threads(), layers.SMALL_CPU_ATTENTION
    torch.set_num_threads(lever.threads or threads)
    layers.SMALL_CPU_ATTENTION = 0 if lever.flash else tokens
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        layers.SMALL_CPU_ATTENTION = tokens


def rows_of(variants: dict[str, Variant], seconds: dict[str, float], peak: float) -> list[dict[str, Any]]:
    """A row for each lever."""
    shipped = variants["as shipped"].size / seconds["as shipped"]
    rows = []
    for name, variant in variants.items():
        step = seconds[name] / variant.lever.replay
        rate = variant.size / step
        row = {"lever": name, "batch": variant.size, "ms a step": 1e3 * step, "samples/s": rate}
        share = f"{variant.flops / step / peak:.0%}"
        rows.append({**row, "ratio": rate / shipped, "of peak": share, "s to compile": variant.compiling or ""})
    return rows


def main() -> None:
    """Time the levers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS), metavar="LEVER")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if default_device("auto").type != "cpu":
        raise UserError("cpu_levers: this machine has a GPU, which it would time; hide it (CUDA_VISIBLE_DEVICES=)")
    variants = {name: Variant(options.recipe, LEVERS[name]) for name in dict.fromkeys(["as shipped", *options.levers])}
    works: dict[str, Callable[[], object]] = {name: variant.step for name, variant in variants.items()}
    pair = variants["as shipped"].training.pair
    device, half = pair.device, pair.teacher.precision == "bf16"
    peak = peak_flops(device, torch.bfloat16 if half else torch.float32)
    seconds = interleaved(works, options.rounds, device)
    facts = {"what": "levers of a step on a CPU", "recipe": options.recipe, "rounds": options.rounds}
    product = f"{peak / 1e12:.2g} TFLOP/s in {'bf16' if half else 'float32'}"
    finish(options.out, device, rows_of(variants, seconds, peak), **facts, peak=product)


if __name__ == "__main__":
    guarded(main, "name fewer --levers")
