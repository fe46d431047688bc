"""Architectures read off the shapes of a checkpoint's tensors, and what shapes do not tell."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.errors import UserError

# What doubles the resolution in a decoder: `Upsample`, or a second residual block.
UPSAMPLER = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")
TOO_FEW = (KeyError, IndexError, ValueError, ZeroDivisionError)  # what tensors that are missing or of odd shapes raise


@dataclass(frozen=True)
class Demand:
    """A parameter that no tensor's shape tells: any one of `keys`, and what is usual."""

    keys: tuple[str, ...]
    hint: str


@dataclass(frozen=True)
class Inferred:
    """A network's target, the parameters that its tensors tell, and those that they do not."""

    target: str
    params: dict[str, Any]
    demands: tuple[Demand, ...]
    usual: Mapping[str, Any] = field(default_factory=dict)  # what no tensor tells, but nearly all such files have

    def missing(self, given: Mapping[str, Any]) -> list[Demand]:
        """What is neither inferred nor given."""
        return [demand for demand in self.demands if not any(key in given for key in demand.keys)]

    def complete(self, given: Mapping[str, Any], where: str, source: Path) -> dict[str, Any]:
        """The whole parameters: the inferred and the given ones.

        Raises:
            UserError: something is still missing, or a given value contradicts the tensors.
        """
        for key, value in given.items():
            if key in self.params and _plain(value) != _plain(self.params[key]):
                raise UserError(f"{where}.{key}: {_plain(value)}, but the tensors of {source} say {self.params[key]}")
        missing = self.missing(given)
        if missing:
            wanted = "; ".join(f"{where}.{' or .'.join(demand.keys)} ({demand.hint})" for demand in missing)
            raise UserError(f"{source}: its tensors do not tell everything; set {wanted}")
        return {**self.usual, **self.params, **given}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def infer_unet(tensors: Mapping[str, Tensor], source: Path, compvis: bool) -> Inferred:
    """The UNet of CompVis's or guided-diffusion's names.

    Args:
        tensors: of the network, without a prefix.
        source: for messages.
        compvis: the file is CompVis's, whose attention has the old order unless told otherwise.

    Raises:
        UserError: a UNet of another kind: a classifier, a text-conditional one, one that resamples without weights.
    """
    _refuse_other_unets(tensors, source)
    width = tensors["time_embed.0.weight"].shape[1]
    ends = {name.split(".")[1] for name in tensors if UPSAMPLER.fullmatch(name)}
    levels, outputs = 1 + len(ends), _count(tensors, "output_blocks")
    blocks = outputs // levels - 1
    if outputs % levels or _count(tensors, "input_blocks") != levels * (blocks + 1):
        raise UserError(f"{source}: its blocks do not divide into {levels} levels; give teacher.target and all params")
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
        "channel_mult": [channels // width for channels in widths],
        "use_scale_shift_norm": tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * out,
        "resblock_updown": f"input_blocks.{blocks + 1}.0.in_layers.2.weight" in tensors,
    }
    if "label_emb.weight" in tensors:
        params["num_classes"] = tensors["label_emb.weight"].shape[0]
    heads = (
        "32 channels a head in CompVis's VQ-f4 releases" if compvis else "the training's flag; 4 heads or 64 channels"
    )
    size = "64 in CompVis's VQ-f4 releases" if compvis else "side of the pictures that it was trained on"
    demands = [Demand(("image_size",), size), Demand(("num_head_channels", "num_heads"), heads)]
    if not compvis:
        demands.append(Demand(("use_new_attention_order",), "the training's flag; false unless it was set"))
    usual = {"use_new_attention_order": False} if compvis else {}
    return Inferred("ldm_dkdm.networks.UNet", params, tuple(demands), usual)


def _refuse_other_unets(tensors: Mapping[str, Tensor], source: Path) -> None:
    if any(".transformer_blocks." in name for name in tensors):
        raise UserError(
            f"{source}: is a text-conditional UNet (cross-attention); only unconditional and class ones work"
        )
    if not any(name.startswith("output_blocks.") for name in tensors):
        raise UserError(f"{source}: is guided-diffusion's classifier (half a UNet), not a diffusion model")


def _count(tensors: Mapping[str, Tensor], part: str) -> int:
    """How many blocks `part.0`, `part.1`, ... there are."""
    place = len(part.split("."))
    indices = {int(name.split(".")[place]) for name in tensors if name.startswith(f"{part}.")}
    if indices != set(range(len(indices))):
        raise ValueError(f"{part} lacks blocks: it goes up to {max(indices)}, but there are {len(indices)}")
    return len(indices)


IMAGENET_TABLE = 1001  # rows of a public DiT's label table: 1,000 classes and none


def infer_dit(tensors: Mapping[str, Tensor]) -> Inferred:
    """The DiT of the public code's names."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    outputs = tensors["final_layer.linear.weight"].shape[0] // patch**2
    params: dict[str, Any] = {
        "input_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _count(tensors, "blocks"),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "learn_sigma": outputs == 2 * channels,
    }
    demands = [Demand(("num_heads",), "6 in DiT-S, 12 in B, 16 in L and XL")]
    table = tensors.get("y_embedder.embedding_table.weight")
    if table is not None and len(table) == IMAGENET_TABLE:
        params |= {"num_classes": IMAGENET_TABLE - 1, "class_dropout_prob": 0.1}
    elif table is not None:
        demands.append(
            Demand(("num_classes",), f"the table has {len(table)} rows, one of them none's if it has a null label")
        )
        demands.append(Demand(("class_dropout_prob",), "0.1 in public DiTs, 0 without a null label"))
    return Inferred("ldm_dkdm.networks.DiT", params, tuple(demands))


def infer_first_stage(tensors: Mapping[str, Tensor], latent_size: int, source: Path) -> tuple[str, dict[str, Any]]:
    """Target and parameters of a VQModel or AutoencoderKL, from its tensors and the side of its latents.

    Args:
        tensors: of the first stage, without a prefix.
        latent_size: side of the latents; no tensor tells it.
        source: for messages.

    Raises:
        UserError: no first stage, or one whose tensors are incomplete.
    """
    if "encoder.conv_in.weight" not in tensors or "quant_conv.weight" not in tensors:
        raise UserError(f"{source}: holds no first stage; name its file or folder in first_stage.ckpt")
    try:
        return _first_stage(tensors, latent_size)
    except TOO_FEW as error:
        raise UserError(f"{source}: its first stage is incomplete or of another kind ({error})") from error


def _first_stage(tensors: Mapping[str, Tensor], latent_size: int) -> tuple[str, dict[str, Any]]:
    channels = tensors["encoder.conv_in.weight"].shape[0]
    levels, blocks = _count(tensors, "encoder.down"), _count(tensors, "encoder.down.0.block")
    resolution = latent_size * 2 ** (levels - 1)
    codes = tensors.get("quantize.embedding.weight")
    moments = tensors["encoder.conv_out.weight"].shape[0] // tensors["decoder.conv_in.weight"].shape[1]
    if moments != (2 if codes is None else 1):  # mean and log variance, or a latent that a codebook rounds
        raise KeyError("quantize.embedding.weight")
    ddconfig = {
        "double_z": codes is None,
        "z_channels": tensors["encoder.conv_out.weight"].shape[0] // moments,
        "resolution": resolution,
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_ch": tensors["decoder.conv_out.weight"].shape[0],
        "ch": channels,
        "ch_mult": [
            tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] // channels for level in range(levels)
        ],
        "num_res_blocks": blocks,
        "attn_resolutions": [
            resolution // 2**level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in tensors
        ],
        "dropout": 0.0,
    }
    params = {"ddconfig": ddconfig, "embed_dim": tensors["quant_conv.weight"].shape[0] // moments}
    if codes is None:
        return "ldm_dkdm.first_stage.AutoencoderKL", params
    return "ldm_dkdm.first_stage.VQModel", {**params, "n_embed": codes.shape[0]}
