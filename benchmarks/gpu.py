"""What the performance page says of a GPU, in one command: python benchmarks/gpu.py -o benchmarks/figures/gpu.json

For every recipe at its batch size, in one run: milliseconds of a distillation step by variant, which take turns, with
the share of a matrix product's speed that the step reaches (model FLOP utilisation; the product is measured in the
same run), and the public code's step (`--baseline CLONE`, see public_code.py); Tab. 9's columns; the device's memory
against rho; images a second of teacher and student; the error of a teacher in bf16; the kinds of kernels. It begins
nothing after `--minutes`, says what it left out, and writes the file after every part. A CPU needs small numbers:
`--batch_size 4 --rounds 2 --images 4 --rho 0.1`.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Pair, guarded, machine, open_pair, table, write
from compile_ahead import compile_ahead
from gpu_parts import Tables, bf16_error, kernels, memory, sampling
from gpu_steps import COMPILED, VARIANTS, peak_flops, variants
from gpu_timing import first_line, measure, rows_of, tab9
from public_code import require_clone
from training_speed import COLUMNS

from ldm_dkdm.device import compiles, default_device
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks.modes import SHAPES
from ldm_dkdm.reporting import duration

PARTS = ("steps", "memory", "sampling", "bf16", "kernels")
STATES = 32  # for the error in bf16, at most


class Report:
    """Figures of all parts so far, in a file; a part that would begin too late is left out."""

    def __init__(self, out: Path | None, minutes: float, device: torch.device, **facts: Any) -> None:
        self.out, self.device, self.end = out, device, time.monotonic() + 60 * minutes
        self.facts: dict[str, Any] = {"what": "a device", **facts, "left_out": {}}
        self.tables: Tables = {name: [] for name in TABLES}

    @property
    def late(self) -> bool:
        """Whether nothing more should begin."""
        return time.monotonic() > self.end

    def part(self, name: str, work: Callable[[], Tables]) -> None:
        """Add the rows of a part to the tables, if there is time for it, and write the figures."""
        started = time.monotonic()
        if self.late:
            self.left_out(name, "the time is up")
        else:
            try:
                for key, rows in work().items():
                    self.tables[key] += rows
            except Exception as error:  # no memory, what a device cannot do, another clone: the other parts go on
                self.left_out(name, first_line(error))
            print(f"{name}: {duration(time.monotonic() - started)}", flush=True)
        if self.facts["compiled"]:
            torch.compiler.reset()  # frees its graphs, and counts recompilations anew
        if self.out is not None:
            write(self.out, self.device, **self.facts, **self.tables)

    def left_out(self, name: str, why: str) -> None:
        """Note what has no figures."""
        print(f"{name}: left out, {why}", flush=True)
        self.facts["left_out"][name] = why

    def show(self) -> None:
        """Print the tables that have rows."""
        for name, rows in self.tables.items():
            if rows:
                print(f"\n{TABLES[name]}:\n\n{table(rows)}")


TABLES = {  # in the file -> what it has
    "rows": "Steps",
    "tab9": "Seconds of 100 iterations as shipped (Tab. 9)",
    "memory": "Peak of the device's memory in GB, uncompiled, by the place of the pool (Fig. 7)",
    "sampling": "DDIM with decoding, uncompiled (Fig. 6)",
    "bf16": "Error of the teacher's eps in bf16, relative to its root mean square, by t",
    "kernels": "What the device computes in a step as shipped",
}


def steps(recipe: str, pair: Pair, size: int, options: argparse.Namespace, report: Report) -> Tables:
    """The rows of a recipe's steps and of Tab. 9."""
    with contextlib.ExitStack() as stack, torch._dynamo.config.patch(recompile_limit=SHAPES):
        made = variants(pair, size, report.facts["compiled"], options.baseline, stack, options.variants or ())
        found = measure(made, options.rounds, pair.device, lambda: report.late)
    for name, why in found.left_out.items():
        report.left_out(f"{recipe}, {name}", why)
    rows = rows_of(recipe, pair, size, found, made, report.facts["peak_flops"])
    both = tab9(recipe, size, found)
    return {"rows": rows, "tab9": [both] if any(both[name] for name in COLUMNS) else []}


def main() -> None:
    """Measure every recipe; see the module."""
    options = parsed()
    for word in options.recipes:
        named(word)
    if options.baseline is not None:
        require_clone(options.baseline)
    device = default_device("auto")
    compiling = compiles(options.compile, device)
    peaks = {"bf16": peak_flops(device, torch.bfloat16), "32": peak_flops(device, torch.float32)}
    print(f"{machine(device)}, matrix products: " + ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in peaks.items()))
    facts = {"compiled": compiling, "rounds": options.rounds, "peak_flops": peaks}
    report = Report(options.out, options.minutes, device, **facts)
    if compiling and options.ahead and "steps" in options.parts:
        ahead(options, report)
    for number, (recipe, batch) in enumerate(map(named, options.recipes)):
        pair = open_pair(recipe, precision="32")
        size = batch or options.batch_size or pair.config.distill.batch_size
        parts: dict[str, Callable[[], Tables]] = {"steps": partial(steps, recipe, pair, size, options, report)}
        if number == 0:
            parts["memory"] = partial(memory, recipe, pair, size, options.rho)
        parts["sampling"] = partial(sampling, recipe, pair, options.images, options.steps)
        parts["bf16"] = partial(bf16_error, recipe, pair, min(STATES, options.images))
        if number == 0:
            parts["kernels"] = partial(kernels, recipe, pair, size, compiling)
        for name, work in parts.items():
            if name in options.parts:
                report.part(f"{options.recipes[number]}, {name}", work)
    report.show()
    if not any(report.tables.values()):
        raise UserError("nothing could be measured; the lines above say why")


def ahead(options: argparse.Namespace, report: Report) -> None:
    """Compile both networks of every recipe in the ways that share nothing, in processes of their own."""
    wanted = [name for name in COMPILED if name in (options.variants or COMPILED)]
    words = ["--compile", options.compile]
    words += ["--batch_size", str(options.batch_size)] if options.batch_size else []
    started = time.monotonic()
    missing = compile_ahead(Path(__file__), options.recipes, wanted, words, started + 60 * options.ahead)
    count, seconds = len(options.recipes) * len(wanted), time.monotonic() - started
    report.facts["compiled_ahead"] = f"{count - len(missing)} of {count} in {duration(seconds)}"
    print("\n".join([f"compiled ahead: {report.facts['compiled_ahead']}", *missing]), flush=True)


def named(word: str) -> tuple[str, int | None]:
    """A recipe and a batch size, of `RECIPE` or `RECIPE=BATCH`.

    Raises:
        UserError: another batch size than a whole number from 1.
    """
    recipe, equals, batch = word.partition("=")
    if equals and not (batch.isdecimal() and int(batch)):
        raise UserError(f"{word}: the batch size must be a whole number, at least 1")
    return recipe, int(batch) if equals else None


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipes = ["ffhq256", "cifar10", "quickstart"]
    parser.add_argument("recipes", nargs="*", default=recipes, metavar="RECIPE", help="or RECIPE=BATCH")
    parser.add_argument("--batch_size", type=int, help="default: the recipe's, which is the paper's")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="steps to time; default: all")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each variant")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.4, 1, 4], help="sizes of the first recipe's pool")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("-c", "--steps", type=int, default=20, help="DDIM steps of the sampling")
    parser.add_argument("--compile", default="auto", choices=["auto", "true", "false"])
    parser.add_argument("--baseline", type=Path, metavar="CLONE", help="a clone of the public code, to time its step")
    parser.add_argument("--ahead", type=float, default=3.0, help="minutes for compiling beside each other; 0: not")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no part after so many, with those of --ahead")
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    guarded(main, "lower --batch_size")
