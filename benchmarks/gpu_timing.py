"""Time ways to make a step in turn, and make the rows of what was found: benchmarks/gpu.py."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import Pair, interleaved, synchronise
from gpu_steps import ENCODING, PUBLIC, SHIPPED, WITHOUT, Variant, step_flops
from training_speed import COLUMNS

SECONDS = 100  # Tab. 9 counts as many iterations
RECORDING = 2  # steps after the first that record graphs


@dataclass(frozen=True)
class Measured:
    """Seconds of each variant's step and of its first one, which compiles; why others have none.

    `room`: GB of the device's memory that the next steps take beside what lasts: weights, averages, moments, pools.
    """

    seconds: dict[str, float]
    first: dict[str, float]
    left_out: dict[str, str]
    room: dict[str, float]


def measure(
    made: Mapping[str, Variant], rounds: int, device: torch.device, late: Callable[[], bool] = lambda: False
) -> Measured:
    """Time the variants in turn, without those that torch cannot run, or that would begin when it is `late`."""
    first, left_out, room = {}, {}, {}
    for name, variant in made.items():
        if late():
            left_out[name] = "the time is up"
            continue
        synchronise(device)
        started = time.perf_counter()
        try:
            variant.step()
            synchronise(device)
            seconds, held = time.perf_counter() - started, _held(device)
            for _ in range(RECORDING if device.type == "cuda" else 0):
                variant.step()
        except Exception as error:  # no memory, what a compiler cannot do, another clone
            left_out[name] = first_line(error)
        else:
            first[name], room[name] = seconds, _most(device) - held
    return Measured(interleaved({name: made[name].step for name in first}, rounds, device), first, left_out, room)


def _held(device: torch.device) -> float:
    """GB that the device holds now; what it holds at most is counted anew."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9


def _most(device: torch.device) -> float:
    """GB that the device has held at most since `_held`."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def first_line(error: Exception) -> str:
    """First line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def rows_of(
    recipe: str, pair: Pair, batch_size: int, found: Measured, made: Mapping[str, Variant], peaks: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for every variant that distils; `public / this` is how many times as fast as the public code it is."""
    rows = []
    for name, seconds in found.seconds.items():
        if name in COLUMNS:
            continue
        precision = made[name].precision
        share = step_flops(pair, batch_size) / seconds / peaks["32" if precision == "32" else "bf16"]
        row: dict[str, Any] = {"recipe": recipe, "batch": batch_size, "variant": name, "precision": precision}
        row |= {
            "ms a step": 1e3 * seconds,
            "MFU": share,
            "first step s": found.first[name],
            "room GB": found.room[name] or "",
        }
        public = found.seconds.get(PUBLIC)
        rows.append({**row, "public / this": "" if public is None else public / seconds})
    return rows


def tab9(recipe: str, batch_size: int, found: Measured) -> dict[str, Any]:
    """The row of Tab. 9: seconds of 100 iterations on data and without, of the student as shipped."""
    seconds = {**found.seconds, WITHOUT: found.seconds.get(SHIPPED)}
    row = {name: SECONDS * seconds[name] if seconds.get(name) else "" for name in COLUMNS}
    both = seconds.get(ENCODING) and seconds[WITHOUT]
    return {"recipe": recipe, "batch": batch_size, **row, "without / on data": both / seconds[ENCODING] if both else ""}
