"""Students in the teacher's shape: a UNet's width for a budget of parameters, weights sliced from the teacher."""

import inspect
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm.errors import UserError
from ldm_dkdm.networks.layers import AttentionBlock, Downsample, ResBlock
from ldm_dkdm.networks.unet import UNet

LARGEST = 10**12  # parameters
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_budget(text: str | int) -> int:
    """A number of parameters: `60M`, `14.5M`, `300k`, `2e6`, `2_000_000` or 2000000.

    Raises:
        UserError: another form, less than one parameter, or more than any network has.
    """
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d+)?)\s*([kmb]?)", str(text).strip().lower())
    budget = min(float(match[1]) * UNITS[match[2]], LARGEST + 1.0) if match else 0
    if not 0.5 < budget <= LARGEST:
        raise UserError(f"budget: expected a number of parameters such as 60M or 300k, got {text!r}")
    return round(budget)


def unet_within_budget(params: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """UNet parameters with the largest `model_channels`, at most the given one, that keep within a budget.

    Args:
        params: keyword arguments of the teacher's UNet; other keys are left out of the result.
        budget: largest number of parameters of the student.

    Raises:
        UserError: even the narrowest UNet of this shape has more, or `norm_groups` fits no width.
    """
    params = {key: value for key, value in params.items() if key in inspect.signature(UNet).parameters}
    widths = _admissible_widths(params)
    if not widths:
        raise UserError(
            f"norm_groups: {params['norm_groups']} groups fit no width up to the teacher's {params['model_channels']}"
        )
    fitting = bisect_right(widths, budget, key=lambda width: _unet_size({**params, "model_channels": width}))
    if not fitting:
        narrowest = _millions(_unet_size({**params, "model_channels": widths[0]}))
        raise UserError(
            f"budget: {_millions(budget)} is too small; the narrowest UNet of the teacher's shape has {narrowest}"
        )
    return {**params, "model_channels": widths[fitting - 1]}


def _admissible_widths(params: Mapping[str, Any]) -> list[int]:
    """The widths up to that of `params`, ascending, at which every level divides into norm groups and heads."""
    arguments = inspect.signature(UNet).bind(**params)
    arguments.apply_defaults()
    full = arguments.arguments
    heads = full["num_heads"] if full["num_head_channels"] == -1 else full["num_head_channels"]
    mults = [Fraction(mult).limit_denominator(full["model_channels"]) for mult in full["channel_mult"]]
    attends = [2**level in full["attention_resolutions"] for level in range(len(mults))]
    attends[-1] = attends[-1] or (full["middle_block"] and full["middle_attention"])
    groups = full["norm_groups"]
    units = [math.lcm(groups, heads) if on else groups for on in attends]
    # width * p/q is a multiple of a unit where the width is one of unit * q / gcd(unit * q, p)
    whole = [(unit * mult.denominator, mult.numerator) for unit, mult in zip(units, mults, strict=True)]
    step = math.lcm(*[unit // math.gcd(unit, mult) for unit, mult in whole])
    return list(range(step, full["model_channels"] + 1, step))


def _unet_size(params: Mapping[str, Any]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(**params).parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}M" if count >= 10**4 else str(count)


@dataclass(frozen=True)
class SliceReport:
    """How many of the student's tensors are slices of the teacher's, equal to them, or still random."""

    sliced: int
    copied: int
    random: int

    def __str__(self) -> str:
        return f"{self.sliced} tensors sliced, {self.copied} copied, {self.random} left random"


@torch.no_grad()
def slice_teacher(student: nn.Module, teacher: nn.Module) -> SliceReport:
    """Copy the leading channels of the teacher's tensors into a UNet, in place, where blocks correspond.

    Blocks correspond by level and place within it, counted as `_layers` does; those without a counterpart,
    and tensors that are larger than the teacher's, keep their weights.

    Raises:
        UserError: one of the two is not a UNet.
    """
    if not (isinstance(student, UNet) and isinstance(teacher, UNet)):
        kinds = f"{type(student).__name__} and {type(teacher).__name__}"
        raise UserError(f"init: teacher needs a UNet student and a UNet teacher (here {kinds}); choose random")
    theirs = dict(_tensors(teacher))
    counts = Counter(_inherit(own, theirs.get(key)) for key, own in _tensors(student))
    return SliceReport(counts["sliced"], counts["copied"], counts["random"])


@dataclass(frozen=True)
class _Axis:
    """What the channels along one axis of a tensor are: parts, each a tensor of positions arranged by meaning.

    A smaller axis takes the leading entries of every part along each of its dimensions, or, if the axis is
    `spread`, entries at even distances.
    """

    parts: tuple[Tensor, ...]
    spread: bool = False

    def index_into(self, teacher: "_Axis") -> Tensor | None:
        """The teacher's position (n,) for each own position; None if the teacher lacks one."""
        index = torch.empty(sum(part.numel() for part in self.parts), dtype=torch.long, device="cpu")
        for own, theirs in zip(self.parts, teacher.parts, strict=True):
            if own.ndim != theirs.ndim or any(n > m for n, m in zip(own.shape, theirs.shape)):
                return None
            taken = theirs
            for dim, (n, m) in enumerate(zip(own.shape, theirs.shape)):
                places = torch.arange(n, dtype=torch.float32, device="cpu") * (m / n if self.spread and n else 1)
                taken = taken.index_select(dim, places.round().long())
            index[own] = taken
        return index


@dataclass(frozen=True)
class _Slot:
    """A parameter and those of its axes that are not simply channel after channel."""

    value: nn.Parameter
    axes: Mapping[int, _Axis] = field(default_factory=dict)

    def axis(self, dim: int) -> _Axis:
        return self.axes.get(dim) or _Axis((torch.arange(self.value.shape[dim], device="cpu"),))


def _inherit(own: _Slot, theirs: _Slot | None) -> str:
    """Fill a parameter from its counterpart; returns how."""
    if theirs is None or own.value.ndim != theirs.value.ndim:
        return "random"
    value: Tensor = theirs.value
    for dim in range(value.ndim):
        index = own.axis(dim).index_into(theirs.axis(dim))
        if index is None:
            return "random"
        value = value.index_select(dim, index.to(value.device))
    own.value.copy_(value)
    return "copied" if own.value.shape == theirs.value.shape else "sliced"


def _tensors(unet: UNet) -> Iterator[tuple[tuple[Any, ...], _Slot]]:
    """Every parameter, by its layer's place and its name in the layer."""
    for place, layer, skip in _layers(unet):
        axes = _axes(layer, skip)
        for name, parameter in layer.named_parameters():
            yield (*place, name), _Slot(parameter, axes.get(name, {}))


def _layers(unet: UNet) -> Iterator[tuple[tuple[Any, ...], nn.Module, int]]:
    """(place, layer, how many of its input's last channels are a skip connection's).

    Both halves have n+1 blocks per level, and block k from the outside of the one feeds its skip connection
    to block k from the outside of the other. Where depths differ, places count from the level's outer end;
    the decoder's innermost block, which alone takes another level's channels, has a place of its own.
    """
    yield ("time",), unet.time_embed, 0
    if unet.num_classes is not None:
        yield ("label",), unet.label_emb, 0
    yield ("out_conv",), unet.out, 0
    levels = 1 + sum(_resamples(next(block.children())) for block in unet.input_blocks)
    per_level = len(unet.input_blocks) // levels
    for k, block in enumerate(unet.input_blocks):
        for layer in block.children():
            yield ("in", k // per_level, k % per_level, *_kind(layer)), layer, 0
    for k, layer in enumerate(unet.middle_block):
        yield ("middle", levels, k), layer, 0
    innermost = unet.middle_block if len(unet.middle_block) else unet.input_blocks[-1]
    for k, (before, block) in enumerate(pairwise([innermost, *unet.output_blocks])):
        level, inside = divmod(len(unet.output_blocks) - 1 - k, per_level)
        place = "innermost" if inside == per_level - 1 else inside
        skip = _residual(block).channels - _residual(before).out_channels
        for layer in block.children():
            yield ("out", level, place, *_kind(layer)), layer, 0 if _resamples(layer) else skip


def _residual(block: nn.Module) -> ResBlock:
    """The residual block that a block of the decoder or the middle begins with."""
    first = next(block.children())
    assert isinstance(first, ResBlock)
    return first


def _kind(layer: nn.Module) -> tuple[str, bool]:
    return type(layer).__name__, _resamples(layer)


def _resamples(layer: nn.Module) -> bool:
    return isinstance(layer, Downsample) or not isinstance(getattr(layer, "resample", nn.Identity()), nn.Identity)


def _axes(layer: nn.Module, skip: int) -> dict[str, dict[int, _Axis]]:
    """The axes of a layer's parameters whose channels are of several kinds, by name and dimension."""
    if isinstance(layer, ResBlock):
        channels, rows = layer.channels, torch.arange(layer.out_channels * (1 + layer.scale_shift), device="cpu")
        joined = _Axis(torch.arange(channels, device="cpu").split([channels - skip, skip]))
        film = _Axis((rows.view(2, -1) if layer.scale_shift else rows,))
        return {
            "in_layers.0.weight": {0: joined},
            "in_layers.0.bias": {0: joined},
            "in_layers.2.weight": {1: joined},
            "skip_connection.weight": {1: joined},
            "emb_layers.1.weight": {0: film},
            "emb_layers.1.bias": {0: film},
        }
    if isinstance(layer, AttentionBlock):
        heads, channels = layer.heads, layer.proj_out.in_channels
        rows = torch.arange(3 * channels, device="cpu")
        rows = rows.view(3, heads, -1).transpose(0, 1) if layer.new_order else rows.view(heads, 3, -1)
        qkv, joined = _Axis((rows,)), _Axis((torch.arange(channels, device="cpu").view(heads, -1),))
        return {"qkv.weight": {0: qkv}, "qkv.bias": {0: qkv}, "proj_out.weight": {1: joined}}
    if isinstance(layer, nn.Sequential) and isinstance(layer[0], nn.Linear):
        width = layer[0].in_features
        return {
            "0.weight": {
                1: _Axis(torch.arange(width, device="cpu").split([width // 2, width // 2, width % 2]), spread=True)
            }
        }
    return {}
