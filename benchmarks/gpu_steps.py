"""Ways to make one optimisation step of a recipe, timed in turn: benchmarks/gpu.py."""

import copy
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import Pair, synchronise
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
COMPILED = (SHIPPED, FORCED, BOTH)  # each compiles networks of its own
VARIANTS = ("float32", "bf16", "bf16, teacher stored", SHIPPED, HOST, *COLUMNS[:2], LAST, FORCED, GRAPHS, BOTH, PUBLIC)
ENCODING, ENCODED, WITHOUT = COLUMNS


@dataclass(frozen=True)
class Variant:
    """A way to make a step: the function, and the number format of its products."""

    step: Callable[[], object]
    precision: str


Maker = Callable[[], Variant]


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


def variants(
    pair: Pair,
    batch_size: int,
    compiling: bool,
    clone: Path | None,
    stack: ExitStack,
    wanted: Collection[str] = (),
) -> dict[str, Variant]:
    """The ways of a recipe by name, until a stack is closed; some share their networks.

    Args:
        wanted: names; default: all that the device and the clone allow.
    """
    makers = ways(pair, batch_size, compiling, stack)
    if clone is not None:
        half = pair.device.type == "cuda" and not pair.teacher.space.encoded
        kind = "float16" if half else "32"
        makers[PUBLIC] = lambda: Variant(_or_fail(lambda: public_step(clone, pair, batch_size)), kind)
    return {name: make() for name, make in makers.items() if name in (wanted or makers)}


def ways(pair: Pair, batch_size: int, compiling: bool, stack: ExitStack) -> dict[str, Maker]:
    """What makes each way but the public code's."""
    own, shipped = pair.device, cache(lambda: shipped_step(pair, batch_size, compiling))

    def plain(precision: str, stored: bool = False) -> Maker:
        if precision == "bf16" and resolve_precision("auto", own) == "32":
            return lambda: Variant(_without_bf16, precision)
        return lambda: _variant(_training(at(pair, precision, stored), batch_size))

    def on(stream: Callable[[Pair], BatchStream]) -> Maker:
        return lambda: _variant(_with(shipped(), stream(shipped().pair)))

    found = {
        "float32": plain("32"),
        "bf16": plain("bf16"),
        "bf16, teacher stored": plain("bf16", stored=True),
        SHIPPED: lambda: _variant(shipped()),
        HOST: on(lambda it: stream_of(it, batch_size, torch.device("cpu"))),
        ENCODING: on(lambda it: DataStream(encoded(it), **on_data(it, batch_size))),
    }
    if pair.teacher.space.encoded:
        found[ENCODED] = on(lambda it: DataStream(cached(it), **on_data(it, batch_size)))
    return found | (on_a_gpu(pair, batch_size, shipped, stack) if own.type == "cuda" and compiling else {})


def on_a_gpu(pair: Pair, batch_size: int, shipped: Callable[[], Training], stack: ExitStack) -> dict[str, Maker]:
    """What is tried on a GPU alone: channels_last, without and with a compiler, and CUDA graphs.

    By itself the compiler leaves a network that trains in NCHW, if one of its convolutions has twice as many inputs as
    outputs, as those after a UNet's skip connections have.

    Args:
        shipped: gives the step as shipped, compiled.
    """
    both = cache(lambda: graphed(pair, batch_size, stack))
    forced = {"force_layout_optimization": True}
    return {
        LAST: lambda: _variant(in_channels_last(pair, batch_size)),
        FORCED: lambda: _variant(shipped_step(pair, batch_size, compiling=True, options=forced)),
        GRAPHS: lambda: _variant(_with(shipped(), both().stream)),
        BOTH: lambda: _variant(both()),
    }


def shipped_step(pair: Pair, batch_size: int, compiling: bool, options: Mapping[str, bool] | None = None) -> Training:
    """A step as shipped, with networks of its own; `options` are the compiler's."""
    training = _training(as_shipped(pair), batch_size)
    for network in (training.pair.teacher.network, training.module.network) if compiling else ():
        network.compile(dynamic=False, options=options)
    return training


def in_channels_last(pair: Pair, batch_size: int) -> Training:
    """A step as shipped, not compiled, with both networks' weights in channels_last."""
    training = _training(as_shipped(pair), batch_size)
    for network in (training.pair.teacher.network, training.module.network):
        network.to(memory_format=torch.channels_last)
    training.follow()
    return training


def graphed(pair: Pair, batch_size: int, stack: ExitStack) -> Training:
    """A step of `trainer.compile: graphs`, until a stack is closed."""
    training = _training(as_shipped(pair), batch_size)
    teacher = training.pair.teacher
    stack.enter_context(replayed(teacher.network, rows_of_call(teacher, batch_size)))
    stack.enter_context(replayed(training.module.network, batch_size, trains=True))
    return training


def _training(pair: Pair, batch_size: int) -> Training:
    return Training(pair, stream_of(pair, batch_size, pair.device))


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
