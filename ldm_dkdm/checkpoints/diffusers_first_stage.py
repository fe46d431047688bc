"""Convert first stages from and to diffusers' VQModel and AutoencoderKL: tensor names, parameters."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.diffusers_keys import require_known, side_of
from ldm_dkdm.checkpoints.diffusers_tensors import modern, require_used, shaped, shapes_of, take
from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.checkpoints.source import read_json
from ldm_dkdm.checkpoints.state_dicts import unwrapped
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.first_stage import FIRST_STAGES

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}  # ours -> diffusers'


def first_stage_name(name: str, levels: int) -> str:
    """taming's tensor name -> the one in diffusers' VQModel and AutoencoderKL."""
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block|attn|downsample|upsample)\.(.*)", name)
    if found:
        half, way, level, kind, rest = found.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        rest = rest.replace("nin_shortcut", "conv_shortcut")
        if kind == "attn":
            index, part, end = rest.split(".")
            inner = f"attentions.{index}.{ATTENTION[part]}.{end}"
        else:
            inner = f"resnets.{rest}" if kind == "block" else f"{kind}rs.0.{rest}"
        return f"{half}.{way}_blocks.{level}.{inner}"
    for ours, theirs in (
        ("mid.block_1", "mid_block.resnets.0"),
        ("mid.block_2", "mid_block.resnets.1"),
        *((f"mid.attn_1.{part}.", f"mid_block.attentions.0.{theirs}.") for part, theirs in ATTENTION.items()),
        (".norm_out", ".conv_norm_out"),
    ):
        name = name.replace(ours, theirs)
    return name


INDEX = "model_index.json"
CLASSES = ("VQModel", "AutoencoderKL")
FAMILIES = (
    "VQModel",
    "Autoencoder",
    "AsymmetricAutoencoder",
    "ConsistencyDecoder",
)  # beginnings of first stages' classes
DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def first_stage_config(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """diffusers' VQModel or AutoencoderKL config for our first stage's parameters."""
    dd, codes = params["ddconfig"], params.get("n_embed")
    kind = CLASSES[codes is None]
    if dd["z_channels"] != params["embed_dim"]:
        raise UserError(f"format: diffusers' {kind} needs embed_dim = z_channels")
    widths = [dd["ch"] * mult for mult in dd["ch_mult"]]
    attends = [dd["resolution"] // 2**level in dd["attn_resolutions"] for level in range(len(widths))]
    own = {} if codes is None else {"num_vq_embeddings": codes, "vq_embed_dim": params["embed_dim"]}
    return {
        "_class_name": kind,
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "down_block_types": [DOWN[on] for on in attends],
        "up_block_types": [UP[on] for on in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": dd["num_res_blocks"],
        "act_fn": "silu",
        "latent_channels": dd["z_channels"],
        "sample_size": dd["resolution"],
        "norm_num_groups": 32,
        "mid_block_add_attention": dd.get("attn_type", "vanilla") != "none",
        "scaling_factor": scale_factor,
        **own,
    }


KL_SCALE = 0.18215  # the library's default `scaling_factor`
WANTED: dict[str, tuple[Any, ...]] = {  # options at which diffusers' first stages compute the same as ours
    "norm_num_groups": (32,),
    "norm_type": ("group",),
    "act_fn": ("silu", "swish"),  # two names of one function
    "use_quant_conv": (True, False),  # without it ours gets an identity
    "use_post_quant_conv": (True, False),
    "lookup_from_codebook": (False,),
    "shift_factor": (None, 0),
    "latents_mean": (None,),  # or a list of 0
    "latents_std": (None,),  # or a list of 1
}
NEUTRAL = {"latents_mean": 0, "latents_std": 1}  # entries of a list that changes nothing


KNOWN = {
    *WANTED,
    *("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
    *("latent_channels", "sample_size", "num_vq_embeddings", "vq_embed_dim", "scaling_factor", "force_upcast"),
    "mid_block_add_attention",
}


def first_stage_params(config: Mapping[str, Any], latent_size: int | None, source: Path) -> dict[str, Any]:
    """Our first stage's parameters for a VQModel's or AutoencoderKL's config.

    The resolution follows from `latent_size`, or from `sample_size` where that is None.
    """
    require_known(config, KNOWN, source)
    widths, codes = list(config["block_out_channels"]), config.get("num_vq_embeddings")
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    attends = [kind == DOWN[1] for kind in down]
    kinds = {*down, *up} - {*DOWN, *UP}
    other = [f"{key} {config[key]}" for key in WANTED if not _is_ours(key, config)]
    if any(width % widths[0] for width in widths):
        other.append(f"block_out_channels {widths} that are not multiples of the first")
    if not kinds and up != [UP[on] for on in reversed(attends)]:
        other.append(f"up_block_types {up} that do not mirror the down_block_types")
    middle = config.get("mid_block_add_attention", True)
    if not middle and any(attends):
        other.append("mid_block_add_attention False beside levels with attention")
    if kinds or other:
        raise UserError(f"{source}: a first stage with {', '.join(sorted(kinds) + other)} is not supported")
    resolution = side_of(config["sample_size"], source) if latent_size is None else latent_size * 2 ** (len(widths) - 1)
    embed = config.get("vq_embed_dim") or config["latent_channels"]
    ddconfig = {
        "double_z": config["_class_name"] == "AutoencoderKL",
        "z_channels": config["latent_channels"],
        "resolution": resolution,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [resolution // 2**level for level, on in enumerate(attends) if on],
        "dropout": 0.0,
        **({} if middle else {"attn_type": "none"}),
    }
    return {"ddconfig": ddconfig, "embed_dim": embed} | ({} if codes is None else {"n_embed": codes})


def _is_ours(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a value in a config is one at which our first stage computes the same."""
    value, same = config.get(key, WANTED[key][0]), WANTED[key]
    return value in same or (key in NEUTRAL and isinstance(value, list) and set(value) == {NEUTRAL[key]})


def _identities(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The 1x1 convolutions around the latents that an AutoencoderKL is without, as ours that change nothing."""
    channels = {"quant_conv": 2 * config["latent_channels"], "post_quant_conv": config["latent_channels"]}
    found = {}
    for name, count in channels.items():
        if not config.get(f"use_{name}", True):
            found[f"{name}.weight"] = torch.eye(count, device="cpu")[..., None, None]
            found[f"{name}.bias"] = torch.zeros(count, device="cpu")
    return found


def first_stage_part(index: Mapping[str, Any]) -> str | None:
    """The name of a pipeline's first stage in its model_index.json: `vqvae`, `vae`, or any part of such a class."""
    classes = {name: str(part[1]) for name, part in index.items() if isinstance(part, list) and part[1:] and part[0]}
    named = [name for name in ("vqvae", "vae") if name in classes]
    return next(iter([*named, *(name for name, kind in classes.items() if kind.startswith(FAMILIES))]), None)


def read_component(folder: Path, latent_size: int | None = None, file: Path | None = None) -> dict[str, Any]:
    """A folder of config.json and weights -> target, params, tensors, scale_factor and doubt of our first stage.

    Args:
        folder: for example a release of Stable Diffusion's VAE.
        latent_size: side of the latents; default: that of the config's `sample_size`.
        file: the weights to read, where the folder holds several.

    Raises:
        UserError: another model, or an unsupported option.
    """
    with blaming(folder, "a config in it is incomplete or does not fit its weights"):
        if not folder.is_dir():
            raise UserError(f"{folder}: is missing; the pipeline's {INDEX} lists this first stage: download it too")
        config = read_json(folder / "config.json")
        if config.get("_class_name") not in CLASSES:
            raise UserError(f"{folder}: is a {config.get('_class_name')}; only {' and '.join(CLASSES)} work")
        params = first_stage_params(config, latent_size, folder / "config.json")
        target = f"ldm_dkdm.first_stage.{config['_class_name']}"
        scale, doubt = _scale(config)
        found = {modern(name): tensor for name, tensor in unwrapped(read_tensors(file or folder)).items()}
        found |= _identities(config)
        levels, tensors, used = len(config["block_out_channels"]), {}, set()
        for name, shape in shapes_of(target, FIRST_STAGES, params, folder).items():
            theirs = first_stage_name(name, levels)
            tensors[name] = shaped(take(found, theirs, folder), shape, theirs, folder)
            used.add(theirs)
        require_used(found, used, folder)
        return {"target": target, "params": params, "tensors": tensors, "scale_factor": scale, "doubt": doubt}


def _scale(config: Mapping[str, Any]) -> tuple[float, str]:
    """The scale of the latents, and why it is in doubt.

    The library's default of both classes is the one of Stable Diffusion's VAE. A VQModel that was saved without a
    thought of it stores it too, and pipelines divide by it since they read the key at all.
    """
    stored, vq = config.get("scaling_factor"), config["_class_name"] == "VQModel"
    if not stored:
        # the default is an AutoencoderKL's; VQModels without the key mean 1, as CompVis's
        default = 1.0 if vq else KL_SCALE
        return default, f"config.json: stores no scaling_factor; {default:g} is taken"
    if vq and stored == KL_SCALE:
        return stored, f"config.json: scaling_factor {stored} is the library's default, meant for an AutoencoderKL"
    return float(stored), ""


def component(
    params: Mapping[str, Any], tensors: Mapping[str, Tensor], scale_factor: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our first stage as diffusers' config and tensors."""
    config, result = first_stage_config(params, scale_factor), {}
    for name, value in tensors.items():
        attention = ".attn" in name and value.ndim == 4
        flat = value.flatten(1) if attention else value
        result[first_stage_name(name, len(config["block_out_channels"]))] = flat.contiguous()
    return config, result
