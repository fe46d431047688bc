"""Where the time of a distillation step goes on a CPU: python benchmarks/step_profile.py quickstart digits

Sums the time inside PyTorch's operations by kind, over steps as they are shipped. A kind's share is the most
that a faster way to do it could save.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import finish, guarded, interleaved, open_pair
from gpu_steps import as_shipped, stream_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from training_speed import Training

from ldm_dkdm.device import autocast, default_device
from ldm_dkdm.errors import UserError

KINDS = {
    "convolutions": ("convolution", "conv2d"),
    "matrix products": ("addmm", "::mm", "bmm", "attention"),
    "GroupNorm": ("group_norm",),
    "SiLU": ("silu",),
    "softmax": ("softmax",),
    "joined skips (cat)": ("::cat",),
    "casts and copies": ("::copy_", "::clone", "::contiguous", "::to"),
    "AdamW": ("adamw",),
    "average of the weights": ("lerp",),
    "other arithmetic": (
        "::add",
        "::mul",
        "::sub",
        "::div",
        "::sum",
        "::mean",
        "::pow",
        "::where",
        "::randn",
        "::fill",
    ),
}  # parts of the names of operations; the first kind that has one counts


def main() -> None:
    """Profile the recipes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["quickstart"], metavar="RECIPE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    options = parser.parse_args()
    device = default_device("auto")
    if device.type != "cpu":
        raise UserError("step_profile: times operations of a CPU; hide the GPU (CUDA_VISIBLE_DEVICES=)")
    found = {recipe: shares(recipe, options.steps) for recipe in options.recipes}
    rows = [{"kind": kind, **{recipe: f"{own[kind]:.1%}" for recipe, own in found.items()}} for kind in (*KINDS, REST)]
    packing = {recipe: prepacking(recipe, options.steps) for recipe in options.recipes}
    facts = {"what": "shares of a step's time by kind of operation", "steps": options.steps, "convolutions_ms": packing}
    finish(options.out, device, rows, **facts)
    for recipe, own in packing.items():
        shown = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in own.items())
        print(f"{recipe}: milliseconds of the teacher's convolutions: {shown}")


REST = "everything else, with Python"


def shares(recipe: str, steps: int) -> Counter[str]:
    """Share of the time of each kind."""
    pair = as_shipped(open_pair(recipe))
    training = Training(pair, stream_of(pair, pair.config.distill.batch_size, pair.device))
    for _ in range(3):
        training.iteration()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(steps):
            training.iteration()
    return by_kind(watched.key_averages())


@torch.no_grad()
def prepacking(recipe: str, rounds: int) -> dict[str, float]:
    """Milliseconds of the teacher's convolutions of a batch, with weights as they are and in oneDNN's order."""
    pair = open_pair(recipe)
    dtype = torch.bfloat16 if pair.teacher.precision == "bf16" else torch.float32
    network, calls = pair.teacher.network.to(dtype), list[tuple[nn.Conv2d, Tensor]]()
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [
        layer.register_forward_hook(lambda own, given, out: calls.append((own, given[0]))) for layer in convolutions
    ]
    x = torch.randn(pair.config.distill.batch_size, *pair.teacher.shape)
    label = pair.teacher.draw_labels(len(x), torch.Generator().manual_seed(0))
    with autocast(pair.teacher.precision, pair.device):
        network(x, torch.zeros(len(x), dtype=torch.long), label)
    for hook in hooks:
        hook.remove()
    inputs = [(layer, x.to(dtype)) for layer, x in calls]
    numbers = [[list(one) for one in (layer.padding, layer.stride, layer.dilation)] for layer, _ in inputs]
    order = torch.ops.mkldnn._reorder_convolution_weight
    weights = [order(layer.weight, *own, layer.groups, list(x.shape)) for (layer, x), own in zip(inputs, numbers)]

    def packed() -> None:
        for (layer, x), weight, own in zip(inputs, weights, numbers):
            torch.ops.mkldnn._convolution_pointwise(x, weight, layer.bias, *own, layer.groups, "none", [], "")

    def plain() -> None:
        for layer, x in inputs:
            layer(x)

    seconds = interleaved({"as they are": plain, "in oneDNN's order": packed}, rounds, pair.device)
    return {name: 1e3 * value for name, value in seconds.items()}


def by_kind(events: Sequence[Any]) -> Counter[str]:
    """Shares of the time inside operations, without that of operations which they call."""
    seconds: Counter[str] = Counter()
    for event in events:
        seconds[kind_of(event.key)] += event.self_cpu_time_total
    return Counter({kind: value / max(1e-12, seconds.total()) for kind, value in seconds.items()})


def kind_of(name: str, kinds: Mapping[str, Sequence[str]] = KINDS) -> str:
    """The kind of an operation or a kernel: the first that has a part of its name."""
    own = name.lower()
    return next((kind for kind, parts in kinds.items() if any(part in own for part in parts)), REST)


if __name__ == "__main__":
    guarded(main, "name a smaller recipe")
