"""Ways to make one optimisation step of a recipe, timed in turn: benchmarks/gpu.py."""

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Pair, interleaved, synchronise
from public_code import public_step
from training_speed import BATCHES, COLUMNS, Training, cached, encoded, on_data

from ldm_dkdm.device import resolve_precision
from ldm_dkdm.distillation.batches import BatchStream
from ldm_dkdm.distillation.data_stream import DataStream
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.distillation.replay import stream_kind
from ldm_dkdm.distillation.stream import DistillStream
from ldm_dkdm.errors import UserError
from ldm_dkdm.model.guidance import rows_of as rows_of_call
from ldm_dkdm.networks.cost import gflops
from ldm_dkdm.networks.modes import replayed, stored_in_bf16

SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied
PUBLIC, SHIPPED, LAST = "public code", "as shipped", "bf16, teacher stored, channels_last"
HOST, FORCED, GRAPHS, BOTH = (
    f"{SHIPPED}, {what}"
    for what in ("pool in host memory", "layout forced", "graphs of the teacher", "graphs of both networks")
)
FORCED_GRAPHS = f"{BOTH}, layout forced"
ENCODING, ENCODED, WITHOUT = COLUMNS
SECONDS = 100  # Tab. 9 counts as many iterations
RECORDING = 2  # steps after the first that record graphs


@dataclass(frozen=True)
class Variant:
    """A way to make a step: the function, and the number format of its products."""

    step: Callable[[], object]
    precision: str


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Floating point operations a second of a large matrix product; float32 as TF32, as a GPU's convolutions are."""
    side = SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
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
    finally:
        torch.set_float32_matmul_precision(before)


def stream_of(
    pair: Pair, batch_size: int, place: torch.device, slots: int | None = None, **method: Any
) -> DistillStream:
    """A distillation's stream with its pool on a device; the pool's size does not change the time of a step.

    `method`: keys of `distill` with other values than the recipe's.
    """
    teacher, slots = pair.teacher, slots or 8 * batch_size
    dtype = getattr(torch, pair.config.distill.pool_dtype)
    labels = teacher.draw_labels(slots, torch.Generator(pair.device).manual_seed(0))
    pool = NoisyPool(slots, teacher.shape, dtype, labeled=labels is not None, device=place)
    pool.move(torch.arange(slots), torch.randint(teacher.schedule.num_timesteps, (slots,)))
    first = torch.arange(min(slots, 8 * batch_size))
    pool.overwrite(first, torch.randn(len(first), *teacher.shape), None if labels is None else labels[: len(first)])
    pool.filled = slots
    config = replace(pair.config.distill, batch_size=batch_size, **method)
    return stream_kind(config)(teacher, pool, config, BATCHES, device=pair.device)


def step_flops(pair: Pair, batch_size: int, replay: int = 1) -> float:
    """Operations of one step: the teacher forward, once for `replay` steps, the student's and its backward (twice)."""
    labelled = pair.teacher.num_classes is not None
    teacher, student = (gflops(model.network, model.shape, labelled) for model in (pair.teacher, pair.student))
    return 1e9 * batch_size * (teacher / replay + 3 * student)


def at(pair: Pair, precision: str, stored: bool = False) -> Pair:
    """A pair whose teacher predicts in a precision, with weights stored as bf16 or not; the student is shared."""
    network = stored_in_bf16(pair.teacher.network) if stored else pair.teacher.network
    teacher = pair.teacher.changed(precision=precision, network=network)
    return replace(pair, teacher=teacher, student=pair.student.changed(precision=precision))


def as_shipped(pair: Pair) -> Pair:
    """A pair with a teacher of its own in the precision that `auto` is on its device: bf16 where that is fast."""
    if resolve_precision("auto", pair.device) == "bf16":
        return at(pair, "bf16", stored=True)
    own = at(pair, "32")
    return replace(own, teacher=own.teacher.changed(network=copy.deepcopy(own.teacher.network)))


def variants(pair: Pair, batch_size: int, compiling: bool, clone: Path | None, stack: ExitStack) -> dict[str, Variant]:
    """The ways of a recipe by name, until a stack is closed; most that are compiled share their networks."""
    own, host = pair.device, torch.device("cpu")
    plain = {"float32": at(pair, "32"), "bf16": at(pair, "bf16"), "bf16, teacher stored": at(pair, "bf16", True)}
    found = {name: _variant(Training(it, stream_of(it, batch_size, own))) for name, it in plain.items()}
    training = shipped_step(pair, batch_size, compiling)
    shipped = training.pair
    if shipped.teacher.precision == "32":
        found |= {name: Variant(_without_bf16, "bf16") for name in plain if name != "float32"}
    found[SHIPPED] = _variant(training)
    found[HOST] = _variant(_with(training, stream_of(shipped, batch_size, host)))
    found[ENCODING] = _variant(_with(training, DataStream(encoded(shipped), **on_data(shipped, batch_size))))
    if pair.teacher.space.encoded:
        found[ENCODED] = _variant(_with(training, DataStream(cached(shipped), **on_data(shipped, batch_size))))
    if clone is not None:
        half = own.type == "cuda" and not pair.teacher.space.encoded
        step = _or_fail(lambda: public_step(clone, pair, batch_size))
        found[PUBLIC] = Variant(step, "float16" if half else "32")
    if own.type == "cuda" and compiling:
        found |= on_a_gpu(pair, training, batch_size, stack)
    return found


def _without_bf16() -> None:
    raise UserError("the device has no fast bf16")


def _or_fail(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A step, or one that fails as making it has failed: it is left out where the variants are measured."""
    try:
        return make()
    except Exception as error:
        failure = error

    def fail() -> None:
        raise failure

    return fail


def _variant(training: Training) -> Variant:
    return Variant(training.iteration, training.pair.teacher.precision)


def _with(training: Training, stream: BatchStream) -> Training:
    """The same student on other batches."""
    own = copy.copy(training)
    own.stream = stream
    return own


def on_a_gpu(pair: Pair, training: Training, batch_size: int, stack: ExitStack) -> dict[str, Variant]:
    """What is tried on a GPU alone: channels_last, and CUDA graphs of the teacher or of both networks.

    Args:
        training: as shipped, compiled.
    """
    last = as_shipped(pair)
    other = Training(last, stream_of(last, batch_size, pair.device))
    for network in (last.teacher.network, other.module.network):
        network.to(memory_format=torch.channels_last)
    other.follow()
    both, again = (graphed(pair, batch_size, stack) for _ in range(2))
    return {
        LAST: _variant(other),
        FORCED: _forced(shipped_step(pair, batch_size, compiling=True)),
        GRAPHS: _variant(_with(training, both.stream)),
        BOTH: _variant(both),
        FORCED_GRAPHS: _forced(again),
    }


def shipped_step(pair: Pair, batch_size: int, compiling: bool) -> Training:
    """A step as shipped, with networks of its own."""
    own = as_shipped(pair)
    training = Training(own, stream_of(own, batch_size, pair.device))
    for network in (own.teacher.network, training.module.network) if compiling else ():
        network.compile(dynamic=False)
    return training


def graphed(pair: Pair, batch_size: int, stack: ExitStack) -> Training:
    """A step of `trainer.compile: graphs`, until a stack is closed."""
    own = as_shipped(pair)
    training = Training(own, stream_of(own, batch_size, pair.device))
    stack.enter_context(replayed(own.teacher.network, rows_of_call(own.teacher, batch_size)))
    stack.enter_context(replayed(training.module.network, batch_size, trains=True))
    return training


def _forced(training: Training) -> Variant:
    """Steps whose compiler puts every convolution in channels_last.

    By itself it leaves a network that trains in NCHW, if one of its convolutions has half as many outputs as inputs, as
    those after a UNet's skip connections have.
    """

    def step() -> None:
        with torch._inductor.config.patch(force_layout_optimization=True):  # read where a call compiles
            training.iteration()

    return Variant(step, training.pair.teacher.precision)


@dataclass(frozen=True)
class Measured:
    """Seconds of each variant's step and of its first one, which compiles; why others have none.

    `room`: GB of the device's memory that the first steps take beside weights, averages and pools.
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
        started, held = time.perf_counter(), _held(device)
        try:
            variant.step()
            synchronise(device)
            seconds = time.perf_counter() - started
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
            "room GB": found.room[name],
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
