"""diffusers pipeline folders, read and written without the library."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.diffusers_names import (
    FIRST_STAGE_CLASSES,
    OLD_ATTENTION,
    first_stage_config,
    first_stage_name,
    first_stage_params,
    join_qkv,
    split_qkv,
    unet_config,
    unet_name,
    unet_params,
)
from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionConfig, NetworkConfig
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.files import write_tensors, write_text
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.networks import NETWORKS

UNET_TARGET = "ldm_dkdm.networks.UNet"
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


@dataclass(frozen=True)
class FirstStage:
    """A VQModel or AutoencoderKL: our parameters, tensors under our names, the scale of the latents."""

    params: dict[str, Any]
    tensors: dict[str, Tensor]
    scale_factor: float = 1.0

    @property
    def target(self) -> str:
        """Its class here; only a codebook has a size."""
        return "ldm_dkdm.first_stage." + ("VQModel" if "n_embed" in self.params else "AutoencoderKL")


@dataclass(frozen=True)
class Pipeline:
    """A pipeline in our terms; without a first stage it is a pixel-space model's."""

    network: NetworkConfig
    tensors: dict[str, Tensor]
    diffusion: DiffusionConfig
    first_stage: FirstStage | None


def is_pipeline(path: Path) -> bool:
    """Whether the path is a diffusers pipeline's folder."""
    return (path / "model_index.json").is_file()


def is_diffusers_component(path: Path) -> bool:
    """Whether the path is the folder of one model of diffusers, such as a VAE."""
    return (path / "config.json").is_file()


def read_first_stage(folder: Path, latent_size: int | None = None) -> FirstStage:
    """Read the folder of a VQModel or an AutoencoderKL, for example a release of Stable Diffusion's VAE.

    Args:
        folder: config.json and the weights.
        latent_size: side of the latents; default: that of the config's `sample_size`.

    Raises:
        UserError: another model, or an option that we do not have.
    """
    with blaming(folder, "a config in it is incomplete or does not fit its weights"):
        return _first_stage_from(folder, latent_size)


def read_pipeline(folder: Path) -> Pipeline:
    """Read a pipeline of a UNet2DModel, a scheduler and, for latents, a VQModel or AutoencoderKL.

    Raises:
        UserError: a missing part, or an option that we do not have; names the file and the key.
    """
    with blaming(folder, "a config in it is incomplete or does not fit its weights"):
        return _read(folder)


def _read(folder: Path) -> Pipeline:
    index = _json(folder / "model_index.json")
    if "unet" not in index or "scheduler" not in index:
        raise UserError(
            f"{folder}: a {index.get('_class_name')} is no pipeline of an unconditional or class-conditional UNet"
        )
    config = _json(folder / "unet" / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(f"{folder}/unet: is a {config.get('_class_name')}; only UNet2DModel works")
    params = unet_params(config, folder / "unet" / "config.json")
    stage = next((folder / name for name in ("vqvae", "vae") if name in index), None)
    diffusion, parameterization = _read_scheduler(folder / "scheduler" / "scheduler_config.json", stage is None)
    tensors = _unet_from(read_tensors(folder / "unet"), params, folder / "unet")
    first_stage = None if stage is None else _first_stage_from(stage, params["image_size"])
    return Pipeline(NetworkConfig(UNET_TARGET, params, parameterization), tensors, diffusion, first_stage)


def _read_scheduler(path: Path, pixel: bool) -> tuple[DiffusionConfig, str]:
    config = _json(path)
    names = {theirs: ours for ours, theirs in SCHEDULES.items()}
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    schedule, kind = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if config.get("trained_betas") is not None or schedule not in names:
        raise UserError(f"{path}: beta_schedule: {schedule!r} is not one of {', '.join(names)}")
    if kind not in kinds:
        raise UserError(f"{path}: prediction_type: {kind!r} is not one of {', '.join(kinds)}")
    clips = config.get("clip_sample", True)
    if clips != pixel:
        raise UserError(f"{path}: clip_sample: {clips} does not fit a model {'of pixels' if pixel else 'of latents'}")
    steps, space = config.get("num_train_timesteps", 1000), "pixel" if pixel else "latent"
    ends = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if schedule == "squaredcos_cap_v2":
        return DiffusionConfig("cosine", steps, space=space), kinds[kind]
    return DiffusionConfig(names[schedule], steps, *ends, space), kinds[kind]


def _first_stage_from(folder: Path, latent_size: int | None) -> FirstStage:
    config = _json(folder / "config.json")
    if config.get("_class_name") not in FIRST_STAGE_CLASSES:
        raise UserError(f"{folder}: is a {config.get('_class_name')}; only {' and '.join(FIRST_STAGE_CLASSES)} work")
    params = first_stage_params(config, latent_size, folder / "config.json")
    # The library's own default for both, 0.18215, is an AutoencoderKL's; VQModels without the key mean 1, as CompVis's.
    default = 1.0 if "n_embed" in params else 0.18215
    stage = FirstStage(params, {}, float(config.get("scaling_factor", default)))
    found = {_modern(name): tensor for name, tensor in read_tensors(folder).items()}
    for name, shape in _shapes({"target": stage.target, "params": params}, folder).items():
        theirs = first_stage_name(name, len(config["block_out_channels"]))
        stage.tensors[name] = _take(found, theirs, folder).reshape(shape)
    return stage


def _unet_from(found: Mapping[str, Tensor], params: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    found = {_modern(name): tensor for name, tensor in found.items()}
    tensors, used = {}, set()
    for name, shape in _shapes({"target": UNET_TARGET, "params": dict(params)}, source).items():
        theirs = unet_name(name, params["num_res_blocks"])
        if ".to_qkv." in theirs:
            names = [theirs.replace("to_qkv", part) for part in ("to_q", "to_k", "to_v")]
            parts = [_take(found, part, source) for part in names]
            tensors[name] = join_qkv(parts, _heads(params, shape[0] // 3))
        else:
            names = [theirs]
            tensors[name] = _take(found, theirs, source).reshape(shape)
        used.update(names)
    unknown = sorted(set(found) - used)
    if unknown:
        raise UserError(f"{source}: holds tensors that this architecture does not have: {', '.join(unknown[:4])}")
    return tensors


def _modern(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _take(tensors: Mapping[str, Tensor], name: str, source: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{source}: {name} is missing")
    return tensors[name]


def _shapes(node: dict[str, Any], folder: Path) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = build(node, {**NETWORKS, **FIRST_STAGES}, f"{folder}/config.json: in our terms")
    return {name: value.shape for name, value in network.state_dict().items()}


def _heads(params: Mapping[str, Any], channels: int) -> int:
    head = params.get("num_head_channels", -1)
    return params.get("num_heads", 1) if head == -1 else channels // head


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is no JSON object")
    return tree


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    """Write an `LDMPipeline` (with a first stage) or a `DDPMPipeline` folder, whole or not at all.

    Raises:
        UserError: a model that diffusers' classes cannot express.
    """
    if pipeline.network.target != UNET_TARGET:
        raise UserError(
            "--to: diffusers' DiT embeds timesteps in other frequencies than DiT's own code; choose safetensors"
        )
    parts = {"unet": (unet_config(pipeline.network.params), _unet_to(pipeline))}
    if pipeline.first_stage is not None:
        parts["vqvae"] = _first_stage_to(pipeline.first_stage)
    scheduler = _scheduler(pipeline)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for name, (config, tensors) in parts.items():
            (temporary / name).mkdir(parents=True)
            write_text(temporary / name / "config.json", json.dumps(config, indent=2) + "\n")
            write_tensors(temporary / name / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        write_text(temporary / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
        classes = {name: config["_class_name"] for name, (config, _) in parts.items()}
        classes["scheduler"] = scheduler["_class_name"]
        index = {"_class_name": "LDMPipeline" if pipeline.first_stage else "DDPMPipeline"}
        index |= {name: ["diffusers", kind] for name, kind in classes.items()}
        write_text(temporary / "model_index.json", json.dumps(index, indent=2) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unet_to(pipeline: Pipeline) -> dict[str, Tensor]:
    params, tensors = pipeline.network.params, {}
    for name, value in pipeline.tensors.items():
        theirs = unet_name(name, params["num_res_blocks"])
        if ".to_qkv." in theirs:
            split = split_qkv(value, _heads(params, len(value) // 3), params.get("use_new_attention_order", False))
            tensors |= {
                theirs.replace("to_qkv", part): v for part, v in zip(("to_q", "to_k", "to_v"), split, strict=True)
            }
        else:
            tensors[theirs] = (value.flatten(1) if value.ndim == 3 else value).contiguous()
    return tensors


def _first_stage_to(stage: FirstStage) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = first_stage_config(stage.params, stage.scale_factor), {}
    for name, value in stage.tensors.items():
        attention = ".attn" in name and value.ndim == 4
        flat = value.flatten(1) if attention else value
        tensors[first_stage_name(name, len(config["block_out_channels"]))] = flat.contiguous()
    return config, tensors


def _scheduler(pipeline: Pipeline) -> dict[str, Any]:
    diffusion = pipeline.diffusion
    common = {
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_schedule": SCHEDULES[diffusion.schedule],
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": None,
        "prediction_type": PREDICTIONS[pipeline.network.parameterization],
    }
    if pipeline.first_stage is not None:
        own = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        return {"_class_name": "DDIMScheduler", **common, **own}
    params = pipeline.network.params
    learned = params["out_channels"] == 2 * params["in_channels"]
    variance = "learned_range" if learned else "fixed_small"
    return {"_class_name": "DDPMScheduler", **common, "clip_sample": True, "variance_type": variance}
