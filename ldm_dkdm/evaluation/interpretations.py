"""Other interpretations of a model's weights: what its file does not store, in the alternatives that are usual."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks import NETWORKS, UNet
from ldm_dkdm.networks.layers import AttentionBlock

USUAL_SCHEDULES = (  # schedule, T, rescale_timesteps
    ("scaled_linear", 1000, False),
    ("linear", 1000, False),
    ("linear", 4000, True),
    ("cosine", 1000, False),
    ("cosine", 4000, False),
    ("cosine", 4000, True),
)


def other_interpretations(model: DiffusionModel) -> Iterator[tuple[str, DiffusionModel]]:
    """The same weights with alternatives for what their file does not store: attention, then the schedule."""
    yield from _other_attention(model)
    if model.stores_schedule:
        return
    own = model.diffusion
    if own.num_timesteps != 1000:
        flipped = not own.rescale_timesteps
        other = replace(own, rescale_timesteps=flipped)
        yield _words(model, {"rescale_timesteps": str(flipped).lower()}), model.changed(diffusion=other)
    for schedule, steps, rescaled in USUAL_SCHEDULES:
        kept: dict[str, Any] = {"space": own.space, "variance": own.variance, "steps_offset": own.steps_offset}
        other = DiffusionConfig(schedule, steps, rescale_timesteps=rescaled, **kept)
        same = own.betas is None and (schedule, steps) == (own.schedule, own.num_timesteps)
        if not (same and (schedule == "cosine" or other == own)):
            yield _words(model, _changes(own, other)), model.changed(diffusion=other)


def _changes(own: DiffusionConfig, other: DiffusionConfig) -> dict[str, object]:
    """The keys that turn a process into another one."""
    keys = ("schedule", "num_timesteps", *(() if other.schedule == "cosine" else ("beta_start", "beta_end")))
    changes: dict[str, object] = {key: getattr(other, key) for key in keys}
    if own.betas is not None:
        changes["betas"] = "null"  # they would stand in place of the schedule
    if own.rescale_timesteps != other.rescale_timesteps:
        changes["rescale_timesteps"] = str(other.rescale_timesteps).lower()
    return changes


def _other_attention(model: DiffusionModel) -> Iterator[tuple[str, DiffusionModel]]:
    network, params = model.network, dict(model.node.params)
    if not isinstance(network, UNet) or not any(name.endswith("qkv.weight") for name in network.state_dict()):
        return
    flipped = not params.get("use_new_attention_order", False)
    yield (
        _words(model, {"use_new_attention_order": str(flipped).lower()}),
        reinterpreted(model, use_new_attention_order=flipped),
    )
    widths = [{"num_head_channels": width} for width in (32, 64, 16)]
    for changes in (*widths, {"num_heads": 1}, {"num_heads": 4}):
        whole = {"num_head_channels": -1, "num_heads": 1, **changes}
        given = {key: params.get(key, default) for key, default in (("num_head_channels", -1), ("num_heads", 1))}
        if whole != given:
            try:
                other = reinterpreted(model, **whole)
            except UserError:
                continue  # these channels do not divide into such heads
            if _heads(other.network) != _heads(network):
                wins = "num_heads" in changes and given["num_head_channels"] != -1  # over num_heads
                yield _words(model, {"num_head_channels": -1, **changes} if wins else changes), other


def _words(model: DiffusionModel, changes: Mapping[str, object]) -> str:
    """Hints as the user would write them."""
    return " ".join(f"{model.hints.key(key)}={value}" for key, value in changes.items())


def _heads(network: nn.Module) -> list[int]:
    return [layer.heads for layer in network.modules() if isinstance(layer, AttentionBlock)]


def reinterpreted(model: DiffusionModel, **changes: Any) -> DiffusionModel:
    """The same weights in an architecture with other parameters, which must change no shape."""
    node = replace(model.node, params={**model.node.params, **changes})
    with torch.device("meta"):
        network = build(node, NETWORKS, "params")
    network.load_state_dict(model.network.state_dict(), assign=True)
    return model.changed(network=network.eval(), node=node)
