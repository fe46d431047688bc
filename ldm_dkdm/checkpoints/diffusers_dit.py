"""Convert DiTs from and to diffusers' DiTTransformer2DModel: tensor names, parameters."""

import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.diffusers_keys import side_of
from ldm_dkdm.device import usual_tensors
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks.dit import DiT, grid_positions

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older files
TARGET = "ldm_dkdm.networks.DiT"
DROPOUT = 0.1  # probability of dropping a label in training; fixed in the library
CONSTANTS = {"class_dropout_prob": DROPOUT, "freq_shift": 1, "mlp_ratio": 4.0}  # our options that the library lacks
NAMES = {  # theirs -> ours, within a block `transformer_blocks.N.` -> `blocks.N.`
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_qkv": "attn.qkv",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
INSIDE, EMBEDDED, OUTSIDE = ({ours: theirs for theirs, ours in names.items()} for names in (NAMES, EMBEDDERS, ENDS))
# Options at which the library computes the same as our DiT; the first is assumed for an absent key.
FIXED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "dropout": (0.0,),
    "cross_attention_dim": (None,),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
    "num_vector_embeds": (None,),
    "attention_type": ("default",),
}
WRITTEN = ("norm_type", "activation_fn", "attention_bias", "norm_elementwise_affine", "dropout")
KNOWN = {
    *FIXED,
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size"),
    *("patch_size", "num_embeds_ada_norm", "norm_eps", "norm_num_groups", "upcast_attention"),
    *("caption_channels", "interpolation_scale", "use_additional_conditions"),  # keys of other norm types
}


def dit_params(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Our DiT's parameters for a DiTTransformer2DModel's config.

    Raises:
        UserError: an option that our DiT does not have; names the file and the key.
    """
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{source}: {key}: {value!r} is not supported, only {allowed[0]!r}")
    unknown = sorted(key for key in set(config) - KNOWN if not key.startswith("_"))
    if unknown:
        raise UserError(f"{source}: {', '.join(unknown)}: unknown keys of a DiTTransformer2DModel")
    channels = config.get("in_channels", 4)
    outputs = config.get("out_channels") or channels
    if outputs not in (channels, 2 * channels):
        raise UserError(f"{source}: out_channels: {outputs} must be {channels} or {2 * channels}")
    heads = config.get("num_attention_heads", 16)
    return {
        "input_size": side_of(config.get("sample_size", 32), source),
        "patch_size": config.get("patch_size", 2),
        "in_channels": channels,
        "hidden_size": heads * config.get("attention_head_dim", 72),
        "depth": config.get("num_layers", 28),
        "num_heads": heads,
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "class_dropout_prob": DROPOUT,
        "learn_sigma": outputs == 2 * channels,
        "freq_shift": 1,
        "norm_eps": config.get("norm_eps", 1e-5),
    }


def dit_to_ours(
    tensors: Mapping[str, Tensor], params: Mapping[str, Any], source: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Tensors of a DiTTransformer2DModel under our names, and its params with `own_embedders` as the blocks need it.

    Every block has embedders of its own there. Those of released files are all the same, and become one.

    Raises:
        UserError: a part of an attention is missing.
    """
    found = {}
    for name, tensor in _joined(tensors, source).items():
        stem, _, kind = name.rpartition(".")
        if name == "pos_embed.pos_embed":  # older files store the sinusoids
            continue
        found[f"{_ours(stem)}.{kind}"] = tensor
    own = [name for name in found if name.startswith("embedders.")]
    same = all(torch.equal(found[name], found[re.sub(r"^embedders\.\d+\.", "", name)]) for name in own)
    if same:
        found = {name: tensor for name, tensor in found.items() if not name.startswith("embedders.")}
    side = params["input_size"] // params["patch_size"]
    with usual_tensors():
        positions = grid_positions(side, params["hidden_size"]).float()[None]
    return {**params, "own_embedders": not same}, {**found, "pos_embed": positions}


def _joined(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """With q, k and v of an attention in one tensor."""
    found = {}
    for name, tensor in tensors.items():
        if ".to_q." in name:
            names = [name.replace(".to_q.", f".to_{part}.") for part in "qkv"]
            missing = [part for part in names if part not in tensors]
            if missing:
                raise UserError(f"{source}: {missing[0]} is missing")
            found[name.replace(".to_q.", ".to_qkv.")] = torch.cat([tensors[part] for part in names])
        elif not re.search(r"\.to_[kv]\.", name):
            found[name] = tensor
    return found


def _ours(stem: str) -> str:
    """Our name of a layer; unknown ones keep theirs, and are refused when they are loaded."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", stem)
    if match is None:
        return ENDS.get(stem, stem)
    index, rest = int(match[1]), match[2]
    if rest.startswith("norm1.emb."):
        inner = EMBEDDERS.get(rest.removeprefix("norm1.emb."), rest)
        return inner if index == 0 else f"embedders.{index - 1}.{inner}"
    return f"blocks.{index}.{NAMES.get(rest, rest)}"


def dit_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """DiTTransformer2DModel's config for our DiT's parameters.

    Raises:
        UserError: an option that the library's DiT does not have.
    """
    own = {name: one.default for name, one in inspect.signature(DiT).parameters.items()} | dict(params)
    if own["num_classes"] is None:
        raise UserError("format: diffusers' DiT takes labels, and this one has none; choose safetensors")
    other = [f"{key} {own[key]}" for key, value in CONSTANTS.items() if own[key] != value]
    if other:
        fixed = ", ".join(f"{key} {value}" for key, value in CONSTANTS.items())
        raise UserError(f"format: diffusers' DiT has no {', '.join(other)} (only {fixed}); choose safetensors")
    return {
        "_class_name": CLASSES[0],
        "num_attention_heads": own["num_heads"],
        "attention_head_dim": own["hidden_size"] // own["num_heads"],
        "in_channels": own["in_channels"],
        "out_channels": own["in_channels"] * (2 if own["learn_sigma"] else 1),
        "num_layers": own["depth"],
        "sample_size": own["input_size"],
        "patch_size": own["patch_size"],
        "num_embeds_ada_norm": own["num_classes"],
        "norm_eps": own["norm_eps"],
        **{key: FIXED[key][0] for key in WRITTEN},
    }


def dit_to_theirs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our DiT's tensors under diffusers' names, with embedders in every block.

    Raises:
        UserError: the embeddings of the positions are not the fixed ones.
    """
    positions = tensors["pos_embed"]
    with usual_tensors():
        fixed = grid_positions(math.isqrt(positions.shape[1]), positions.shape[2])[None]
    if not torch.allclose(positions.double().cpu(), fixed, atol=1e-6):
        raise UserError("format: diffusers' DiT has fixed embeddings of positions (pos_embed); choose safetensors")
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    shared = not any(name.startswith("embedders.") for name in tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        places = [place for block in sorted(blocks) for place in [_theirs(stem, int(block), shared)] if place]
        parts = tensor.chunk(3) if stem.endswith("attn.qkv") else (tensor,)
        for place in dict.fromkeys(places):
            names = [place.replace("to_qkv", f"to_{part}") for part in "qkv"] if len(parts) == 3 else [place]
            found |= {f"{one}.{kind}": part.clone() for one, part in zip(names, parts, strict=True)}
    return found


def _theirs(stem: str, block: int, shared: bool) -> str | None:
    """Their name of one of our layers in a block or outside the blocks; None for one of another block."""
    if stem in OUTSIDE:
        return OUTSIDE[stem]
    inner = f"blocks.{block}."
    if stem.startswith(inner):
        return f"transformer_blocks.{block}.{INSIDE[stem.removeprefix(inner)]}"
    own = f"embedders.{block - 1}." if block else ""
    embedder = stem if shared else stem.removeprefix(own) if stem.startswith(own) else ""
    return f"transformer_blocks.{block}.norm1.emb.{EMBEDDED[embedder]}" if embedder in EMBEDDED else None
