"""Read and write DiT's layout: `{model, ema, opt, args}` of a training, or a release's bare state dict."""

import inspect
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.checkpoints.as_built import require_as_built
from ldm_dkdm.checkpoints.contents import Contents, Demand
from ldm_dkdm.checkpoints.diffusers_dit import dit_config
from ldm_dkdm.checkpoints.shapes import TOO_FEW, count_blocks, detached
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.checkpoints.state_dicts import DIT as DIT_NAMES
from ldm_dkdm.checkpoints.state_dicts import Weights
from ldm_dkdm.checkpoints.writing import SavedModel, require_name, require_plain_timesteps
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import write_torch
from ldm_dkdm.networks import DiT

NAME = "DiT"
FIXED = ("freq_shift", "norm_eps", "own_embedders")  # DiT's code has no such options; diffusers' DiTs differ in them
IMAGENET_TABLE = 1001  # rows of a public DiT's label table: 1,000 classes and the null label


def recognises(source: Source) -> bool:
    """Whether a file holds a DiT's tensors."""
    return source.weights(DIT_NAMES) != Weights()


def read(source: Source) -> Contents:
    """Infer the network from its tensors; the layout stores no noise schedule.

    Raises:
        UserError: tensors are missing.
    """
    found = source.weights(DIT_NAMES)
    try:
        inferred = _inferred(found.ema or found.raw or {})
    except TOO_FEW as error:
        raise UserError(f"{source.path}: its network is incomplete or of another kind ({error})") from error
    return Contents(
        path=source.path,
        file=source.path,
        format=NAME,
        **inferred,
        ema=found.ema,
        raw=found.raw,
    )


def _inferred(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    outputs = tensors["final_layer.linear.weight"].shape[0] // patch**2
    usual: dict[str, Any] = {}
    params: dict[str, Any] = {
        "input_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": count_blocks(tensors, "blocks"),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": outputs == 2 * channels,
    }
    demands = [Demand(("num_heads",), "6 in DiT-S, 12 in B, 16 in L and XL")]
    table = tensors.get("y_embedder.embedding_table.weight")
    if table is not None and len(table) == IMAGENET_TABLE:
        usual = {"num_classes": IMAGENET_TABLE - 1, "class_dropout_prob": 0.1}
    elif table is not None:
        demands.append(
            Demand(("num_classes",), f"the table has {len(table)} rows, the null label's included if it has one")
        )
        demands.append(Demand(("class_dropout_prob",), "0.1 in public DiTs, 0 without a null label"))
    space = "pixel" if channels in (1, 3) else "latent"  # latents may have 3 channels; public DiTs' have 4
    found = {"target": "ldm_dkdm.networks.DiT", "params": params, "usual": usual, "demands": tuple(demands)}
    return {**found, "space": space, "usual_schedule": "linear"}


def _others(model: SavedModel) -> str:
    """The formats that hold this DiT, for a message."""
    with suppress(UserError):
        dit_config(model.node.params)
        return "diffusers or safetensors" if model.space.encoded else "safetensors"
    return "safetensors"


def write(model: SavedModel, path: Path) -> None:
    """Write the network's state dict, as in the public releases.

    Raises:
        UserError: another architecture, a DiT of diffusers' that differs, a network that predicts v, or a name that
            ends in .safetensors.
    """
    require_name(path, "dit")
    if type(model.network) is not DiT or model.node.parameterization != "eps":
        raise UserError("format: dit holds a DiT that predicts eps; choose safetensors")
    require_as_built(model.network, model.node)
    known = inspect.signature(DiT).parameters
    other = [key for key in FIXED if model.node.params.get(key, known[key].default) != known[key].default]
    if other:
        raise UserError(f"format: DiT's code has no {', '.join(other)}; choose {_others(model)}")
    require_plain_timesteps(model, "DiT's code")
    write_torch(path, detached(model.network.state_dict()))
