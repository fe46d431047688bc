"""Infer a UNet's architecture from its tensors' shapes, and list what shapes do not show."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.checkpoints.contents import Demand
from ldm_dkdm.checkpoints.shapes import TOO_FEW, count_blocks, missing_blocks, multiples, refuse_concatenated
from ldm_dkdm.errors import UserError

# Tensors that double the resolution in a decoder: those of `Upsample`, or of a second residual block.
UPSAMPLER = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")


def infer_unet(
    tensors: Mapping[str, Tensor], source: Path, compvis: bool, embeds_classes: bool = False
) -> dict[str, Any]:
    """The UNet of CompVis's or guided-diffusion's names, as keywords of `Contents`: target, params, demands, usual.

    Args:
        tensors: the network's, without a prefix.
        source: for messages.
        compvis: the file is CompVis's, whose attention has the old order unless a hint says otherwise.
        embeds_classes: the file holds an embedder of classes beside the network.

    Raises:
        UserError: a UNet of another kind: a classifier, one conditioned on a text or an image, an incomplete one.
    """
    _refuse_other_unets(tensors, source, embeds_classes)
    try:
        inferred = _inferred(tensors, source, compvis)
    except TOO_FEW as error:
        raise UserError(f"{source}: its network is incomplete or of another kind ({error})") from error
    refuse_concatenated(inferred["params"]["in_channels"], inferred["params"]["out_channels"], source)
    return inferred


def _inferred(tensors: Mapping[str, Tensor], source: Path, compvis: bool) -> dict[str, Any]:
    width = tensors["time_embed.0.weight"].shape[1]
    outputs = count_blocks(tensors, "output_blocks")
    ends = {name.split(".")[1] for name in tensors if UPSAMPLER.fullmatch(name)}
    pools = [] if ends else missing_blocks(tensors, "input_blocks")  # pooling has no tensors, so its numbers are absent
    levels = 1 + len(ends or pools)
    blocks = outputs // levels - 1
    inputs = len(pools) + count_blocks(tensors, "input_blocks", skipped=pools)
    if outputs % levels or inputs != levels * (blocks + 1):
        raise UserError(f"{source}: its blocks do not divide into {levels} levels; give target and all params")
    if pools != [level * (blocks + 1) for level in range(1, 1 + len(pools))]:
        raise ValueError(f"input_blocks lacks blocks {', '.join(map(str, pools))}")
    firsts = [1 + level * (blocks + 1) for level in range(levels)]  # the first residual block of every level
    widths = [tensors[f"input_blocks.{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    out = tensors["input_blocks.1.0.out_layers.3.weight"].shape[0]
    params: dict[str, Any] = {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "model_channels": width,
        "out_channels": tensors["out.2.weight"].shape[0],
        "num_res_blocks": blocks,
        "attention_resolutions": [
            2**level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in tensors
        ],
        "channel_mult": multiples(widths, width),
        "use_scale_shift_norm": tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * out,
        "resblock_updown": f"input_blocks.{blocks + 1}.0.in_layers.2.weight" in tensors,
    }
    if pools:
        params["conv_resample"] = False
    if "label_emb.weight" in tensors:
        params["num_classes"] = tensors["label_emb.weight"].shape[0]
    heads = (
        "32 channels a head in CompVis's VQ-f4 releases" if compvis else "as in the training; 4 heads or 64 channels"
    )
    size = "64 in CompVis's VQ-f4 releases" if compvis else "side of the images that it was trained on"
    demands = [Demand(("image_size",), size), Demand(("num_head_channels", "num_heads"), heads)]
    if not compvis:
        demands.append(Demand(("use_new_attention_order",), "as in the training; false by default"))
    usual = {"use_new_attention_order": False} if compvis else {}
    return {"target": "ldm_dkdm.networks.UNet", "params": params, "demands": tuple(demands), "usual": usual}


def _refuse_other_unets(tensors: Mapping[str, Tensor], source: Path, embeds_classes: bool) -> None:
    if any(".transformer_blocks." in name for name in tensors):
        kind = "class-conditional UNet" if embeds_classes else "text-conditional UNet"
        raise UserError(
            f"{source}: is a {kind} whose condition comes by cross-attention, which is not supported; only "
            "unconditional UNets and those that add a class embedding to the time's (label_emb) work"
        )
    if not any(name.startswith("output_blocks.") for name in tensors):
        raise UserError(f"{source}: is guided-diffusion's classifier (half a UNet), not a diffusion model")
