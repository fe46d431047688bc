"""Convert UNets from and to diffusers' UNet2DModel: tensor names, parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.checkpoints.diffusers_keys import require_known, side_of
from ldm_dkdm.checkpoints.diffusers_tensors import (
    join_qkv,
    modern,
    require_used,
    shaped,
    shapes_of,
    split_qkv,
    take,
)
from ldm_dkdm.checkpoints.shapes import multiples, refuse_concatenated
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.networks.unet import level_widths

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
# Options at which UNet2DModel computes what our UNet can; the first is assumed for an absent key.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),  # two names of one function
    "class_embed_type": (None,),
}
UNET_DEFAULTS = {
    "sample_size": None,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "dropout": 0.0,
    "attn_norm_num_groups": None,
    "add_attention": True,
}
SCALE_SHIFTS = ("default", "scale_shift")
OF_AVERAGING = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)  # keys that diffusers' EMAModel adds to the config of its weights
# Constants of layers under their names there -> ours, and the library's default.
CONSTANTS = {
    "freq_shift": ("freq_shift", 0),
    "flip_sin_to_cos": ("cosines_first", True),
    "downsample_padding": ("downsample_padding", 1),
    "norm_eps": ("norm_eps", 1e-5),
    "norm_num_groups": ("norm_groups", 32),
}
NEEDED = ("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types")
KNOWN = {*UNET_FIXED, *UNET_DEFAULTS, *CONSTANTS, *NEEDED, *OF_AVERAGING, "num_train_timesteps"}
PLAIN_DOWN, PLAIN_UP = ("DownBlock2D", "ResnetDownsampleBlock2D"), ("UpBlock2D", "ResnetUpsampleBlock2D")


def unet_name(name: str, num_res_blocks: int) -> str:
    """diffusers' name of one of our UNet's tensors; `to_qkv` stands for its to_q, to_k and to_v."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{kind}"
    part, index, rest = stem.split(".", 2)
    if part == "middle_block":
        return f"mid_block.{MIDDLE[index]}.{_inner(rest)}.{kind}"
    sub, _, inner = rest.partition(".")
    level, place = divmod(int(index) - (part == "input_blocks"), num_res_blocks + 1)
    block = f"{'down' if part == 'input_blocks' else 'up'}_blocks.{level}"
    if inner in ("op", "conv"):
        return f"{block}.{'downsamplers' if inner == 'op' else 'upsamplers'}.0.conv.{kind}"
    if inner.split(".")[0] in ("norm", "qkv", "proj_out"):
        return f"{block}.attentions.{place}.{_inner(inner)}.{kind}"
    if part == "input_blocks" and place == num_res_blocks:
        return f"{block}.downsamplers.0.{_inner(inner)}.{kind}"
    if part == "output_blocks" and sub != "0":
        return f"{block}.upsamplers.0.{_inner(inner)}.{kind}"
    return f"{block}.resnets.{place}.{_inner(inner)}.{kind}"


def _inner(name: str) -> str:
    return {**RESNET, "norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}[name]


def unet_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """UNet2DModel's config for our UNet's parameters.

    Raises:
        UserError: an architecture that UNet2DModel cannot express.
    """
    mults = list(params["channel_mult"])
    widths = level_widths(params["model_channels"], mults)
    attends = [2**level in params["attention_resolutions"] for level in range(len(mults))]
    if mults[0] != 1:
        raise UserError(
            f"format: diffusers derives the timestep's width from the first level; channel_mult[0] is {mults[0]}"
        )
    if not params.get("conv_resample", True):
        raise UserError("format: diffusers has no UNet that resamples without weights (conv_resample: false)")
    updown = params.get("resblock_updown", False)
    middle = params.get("middle_block", True)
    in_middle = middle and params.get("middle_attention", True)
    head = params.get("num_head_channels", -1)
    if head == -1:
        attending = [width for width, on in zip(widths, attends, strict=True) if on] + [widths[-1]] * in_middle
        per_level = {width // params.get("num_heads", 1) for width in attending}
        if len(per_level) > 1:
            raise UserError(f"format: diffusers has one head width for all levels, this model has {sorted(per_level)}")
        head = per_level.pop() if per_level else UNET_DEFAULTS["attention_head_dim"]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "layers_per_block": params["num_res_blocks"],
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if on else PLAIN_DOWN[updown] for on in attends],
        "up_block_types": ["AttnUpBlock2D" if on else PLAIN_UP[updown] for on in reversed(attends)],
        "attention_head_dim": head,
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "resnet_time_scale_shift": "scale_shift" if params.get("use_scale_shift_norm", False) else "default",
        "num_class_embeds": params.get("num_classes"),
        "dropout": params.get("dropout", 0.0),
        **{key: allowed[0] for key, allowed in UNET_FIXED.items()},
        **{theirs: params.get(ours, usual) for theirs, (ours, usual) in CONSTANTS.items()},
        "attn_norm_num_groups": params.get("norm_groups", 32) if params.get("use_scale_shift_norm", False) else None,
        "add_attention": params.get("middle_attention", True),
        "mid_block_type": UNET_FIXED["mid_block_type"][0 if middle else 1],
    }


def unet_params(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Our UNet's parameters for a UNet2DModel's config.

    Raises:
        UserError: an option that our UNet does not have; names the key.
    """
    for key, allowed in _allowed(config).items():
        if config.get(key, allowed[0]) not in allowed:
            known = " or ".join(map(repr, allowed))
            raise UserError(f"{source}: {key}: {config[key]!r} is not supported, only {known}")
    require_known(config, KNOWN, source)
    get = {**UNET_DEFAULTS, **config}.__getitem__
    if get("resnet_time_scale_shift") not in SCALE_SHIFTS:
        value, known = get("resnet_time_scale_shift"), " or ".join(map(repr, SCALE_SHIFTS))
        raise UserError(f"{source}: resnet_time_scale_shift: {value!r} is not supported, only {known}")
    middle = config.get("mid_block_type", "") is not None
    attends_there = middle and get("add_attention")
    scales = get("resnet_time_scale_shift") == "scale_shift"
    if attends_there:
        _require_norm(config, scales, source)
    widths = list(get("block_out_channels"))
    down, up = ([kind.removeprefix("UNetRes") for kind in get(f"{way}_block_types")] for way in ("down", "up"))
    updown = get("downsample_type") == "resnet"
    attends = [kind == "AttnDownBlock2D" for kind in down]
    wanted_up = ["AttnUpBlock2D" if on else PLAIN_UP[updown] for on in reversed(attends)]
    wanted_down = ["AttnDownBlock2D" if on else PLAIN_DOWN[updown] for on in attends]
    single = len(widths) - 1  # the last level resamples nothing, so that both plain kinds mean the same there
    kinds = [
        (a, b) for i, (a, b) in enumerate(zip(down, wanted_down, strict=True)) if i != single or a not in PLAIN_DOWN
    ]
    kinds += [(a, b) for i, (a, b) in enumerate(zip(up, wanted_up, strict=True)) if i != single or a not in PLAIN_UP]
    for found, expected in kinds:
        if found != expected:
            raise UserError(f"{source}: block type {found} is not supported here, only {expected}")
    if get("upsample_type") != get("downsample_type"):
        raise UserError(f"{source}: upsample_type: {get('upsample_type')!r} differs from downsample_type")
    refuse_concatenated(get("in_channels"), get("out_channels"), source)
    constants = {ours: config[key] for key, (ours, usual) in CONSTANTS.items() if config.get(key, usual) != usual}
    head = {"num_head_channels": get("attention_head_dim")} if get("attention_head_dim") else {"num_heads": 1}
    classes = {} if get("num_class_embeds") is None else {"num_classes": get("num_class_embeds")}
    return {
        "image_size": side_of(get("sample_size"), source),
        "in_channels": get("in_channels"),
        "out_channels": get("out_channels"),
        "model_channels": widths[0],
        "num_res_blocks": get("layers_per_block"),
        "attention_resolutions": [2**level for level, on in enumerate(attends) if on],
        "channel_mult": multiples(widths, widths[0]),
        "use_scale_shift_norm": scales,
        "resblock_updown": updown,
        **({"dropout": get("dropout")} if get("dropout") else {}),
        **({} if middle else {"middle_block": False}),
        **({} if attends_there or not middle else {"middle_attention": False}),
        **head,
        **classes,
        **constants,
    }


def _require_norm(config: Mapping[str, Any], scales: bool, source: Path) -> None:
    """Refuse a middle attention whose norm is not that of the other layers, or absent as diffusers leaves it."""
    usual = config.get("norm_num_groups", 32)
    allowed = (usual,) if scales else (None, usual)
    if (found := config.get("attn_norm_num_groups")) not in allowed:
        known, absent = " or ".join(map(repr, allowed)), ", which leaves the middle attention without its norm,"
        why = absent if found is None else ""
        raise UserError(f"{source}: attn_norm_num_groups: {found!r}{why} is not supported, only {known}")


def _allowed(config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """`UNET_FIXED` with another spelling of the same: the usual width of the timestep's embedding as a number."""
    widths, found = config.get("block_out_channels"), dict(UNET_FIXED)
    if isinstance(widths, list) and widths and isinstance(widths[0], int):
        found["time_embedding_dim"] = None, 4 * widths[0]
    return found


def to_ours(tensors: Mapping[str, Tensor], params: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """A UNet2DModel's tensors under our names.

    Raises:
        UserError: a missing or unexpected tensor.
    """
    found = {modern(name): tensor for name, tensor in tensors.items()}
    result, used = {}, set()
    for name, shape in shapes_of("ldm_dkdm.networks.UNet", NETWORKS, params, source).items():
        theirs = unet_name(name, params["num_res_blocks"])
        if ".to_qkv." in theirs:
            names = [theirs.replace("to_qkv", part) for part in ("to_q", "to_k", "to_v")]
            flat = shape[0] // 3, *shape[1:-1]
            parts = [shaped(take(found, part, source), flat, part, source) for part in names]
            order = params.get("use_new_attention_order", False)
            result[name] = join_qkv(parts, _heads(params, shape[0] // 3), order)
        else:
            names = [theirs]
            result[name] = shaped(take(found, theirs, source), shape, theirs, source)
        used.update(names)
    require_used(found, used, source)
    return result


def to_theirs(tensors: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our UNet's tensors under UNet2DModel's names."""
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        theirs = unet_name(name, params["num_res_blocks"])
        if ".to_qkv." in theirs:
            split = split_qkv(value, _heads(params, len(value) // 3), params.get("use_new_attention_order", False))
            result |= {
                theirs.replace("to_qkv", part): v for part, v in zip(("to_q", "to_k", "to_v"), split, strict=True)
            }
        else:
            result[theirs] = (value.flatten(1) if value.ndim == 3 else value).contiguous()
    return result


def _heads(params: Mapping[str, Any], channels: int) -> int:
    head = params.get("num_head_channels", -1)
    return params.get("num_heads", 1) if head == -1 else channels // head
