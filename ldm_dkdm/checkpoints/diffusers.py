"""Read and write diffusers folders without the library: a pipeline, or one UNet2DModel."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.diffusers_first_stage import component
from ldm_dkdm.checkpoints.diffusers_unet import to_ours, to_theirs, unet_config, unet_params
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.reading import read_tensors, weights_in
from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.checkpoints.source import Source, read_json
from ldm_dkdm.checkpoints.writing import SavedModel, refuse_existing, require_plain_timesteps
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.files import write_tensors, write_text
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.pixel import SPACES

NAME = "diffusers folder"
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
NOTES = "ldm_dkdm.json"  # what diffusers' files have no key for; the library does not read it
NOTED = ("null_label", "info")


def recognises(source: Source) -> bool:
    """Whether the path is a pipeline's folder or that of one network."""
    if not source.is_folder:
        return False
    named = source.holds("config.json") and "_class_name" in source.json("config.json")
    return named or source.holds("model_index.json")


def read(source: Source) -> Contents:
    """A pipeline of a UNet2DModel, a scheduler and, for latents, a first stage; or a UNet2DModel alone.

    Raises:
        UserError: a missing part or an unsupported option; names the file and the key.
    """
    with blaming(source.path, "a config in it is incomplete or does not fit its weights"):
        folder = source.path
        if not source.holds("model_index.json"):
            inside = folder.name == "unet" and (folder.parent / "model_index.json").is_file()
            return _pipeline(folder.parent) if inside else _component(folder)
        return _pipeline(folder)


def _component(folder: Path) -> Contents:
    """One network; its folder stores no noise schedule."""
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    params = _params(folder, notes)
    tensors = to_ours(read_tensors(folder), params, folder)
    return Contents(
        path=folder,
        file=weights_in(folder),
        format=NAME,
        target="ldm_dkdm.networks.UNet",
        params=params,
        raw=tensors,
        space="pixel",
    )


def _params(folder: Path, notes: dict[str, Any]) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(f"{folder}: is a {config.get('_class_name')}; only UNet2DModel works")
    order = {"use_new_attention_order": True} if notes.get("use_new_attention_order") else {}
    return {**unet_params(config, folder / "config.json"), **order}


def _pipeline(folder: Path) -> Contents:
    index = read_json(folder / "model_index.json")
    if "unet" not in index or "scheduler" not in index:
        raise UserError(
            f"{folder}: a {index.get('_class_name')} is not a pipeline of an unconditional or class-conditional UNet"
        )
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    params = _params(folder / "unet", notes)
    stage = next((name for name in ("vqvae", "vae") if name in index), None)
    space = "pixel" if stage is None else "latent"
    diffusion, parameterization = _process(folder / "scheduler" / "scheduler_config.json", space)
    return Contents(
        path=folder,
        file=weights_in(folder / "unet"),
        format=NAME,
        target="ldm_dkdm.networks.UNet",
        params=params,
        raw=to_ours(read_tensors(folder / "unet"), params, folder / "unet"),
        parameterization=parameterization,
        diffusion=diffusion,
        first_stage=None if stage is None else FirstStageSource(folder),
        **{key: notes[key] for key in NOTED if notes.get(key) is not None},
        described=True,
    )


def _process(path: Path, space: str) -> tuple[DiffusionConfig, str]:
    """The forward process of a scheduler's config, and what the network predicts."""
    config = read_json(path)
    names = {theirs: ours for ours, theirs in SCHEDULES.items()}
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    schedule, kind = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if kind not in kinds:
        raise UserError(f"{path}: prediction_type: {kind!r} is not one of {', '.join(kinds)}")
    clips, clipped = config.get("clip_sample", True), SPACES[space].clip is not None
    if clips != clipped:
        raise UserError(f"{path}: clip_sample: {clips} does not fit a model of {space} space")
    if config.get("trained_betas") is not None:
        betas = config["trained_betas"]
        return DiffusionConfig(num_timesteps=len(betas), betas=betas, space=space), kinds[kind]
    if schedule not in names:
        raise UserError(f"{path}: beta_schedule: {schedule!r} is not one of {', '.join(names)}")
    steps, ends = (
        config.get("num_train_timesteps", 1000),
        (config.get("beta_start", 1e-4), config.get("beta_end", 0.02)),
    )
    if names[schedule] == "cosine":
        return DiffusionConfig("cosine", steps, space=space), kinds[kind]
    return DiffusionConfig(names[schedule], steps, *ends, space=space), kinds[kind]


def write(model: SavedModel, path: Path) -> None:
    """Write an `LDMPipeline` (with a first stage) or a `DDPMPipeline` folder, atomically.

    Raises:
        UserError: a model that diffusers' classes cannot express, or a folder that exists.
    """
    refuse_existing(path)
    require_plain_timesteps(model, "diffusers")
    if isinstance(model.network, DiT):
        raise UserError(
            "format: diffusers' DiT embeds timesteps in other frequencies than DiT's own code; choose safetensors"
        )
    if not isinstance(model.network, UNet):
        raise UserError(f"format: diffusers has no {type(model.network).__name__}; choose safetensors")
    parts = {"unet": (unet_config(model.node.params), to_theirs(model.network.state_dict(), model.node.params))}
    if model.space.encoded:
        codec = model.codec()
        parts["vqvae"] = component(codec.params, codec.autoencoder.state_dict(), codec.scale_factor)
    scheduler = scheduler_config(model)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for name, (config, tensors) in parts.items():
            (temporary / name).mkdir(parents=True)
            _write_json(temporary / name / "config.json", config)
            write_tensors(temporary / name / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        classes = {name: config["_class_name"] for name, (config, _) in parts.items()}
        classes["scheduler"] = scheduler["_class_name"]
        index = {"_class_name": "LDMPipeline" if model.space.encoded else "DDPMPipeline"}
        _write_json(
            temporary / "model_index.json", index | {name: ["diffusers", kind] for name, kind in classes.items()}
        )
        _write_json(temporary / NOTES, _notes(model))
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_text(path, json.dumps(tree, indent=2) + "\n")


def _notes(model: SavedModel) -> dict[str, Any]:
    order = bool(model.node.params.get("use_new_attention_order", False))
    own = {key: plain(getattr(model, key)) for key in NOTED}
    return {"use_new_attention_order": order, **own}


def scheduler_config(model: SavedModel) -> dict[str, Any]:
    """Config of the diffusers scheduler that samples as this package does."""
    diffusion, params = model.diffusion, model.node.params
    named = diffusion.betas is None and diffusion.schedule in SCHEDULES
    common = {
        "num_train_timesteps": model.schedule.num_timesteps,
        "beta_schedule": SCHEDULES.get(diffusion.schedule, "linear"),
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": None if named else model.schedule.betas.tolist(),
        "prediction_type": PREDICTIONS[model.node.parameterization],
    }
    if model.space.encoded:
        own = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        return {"_class_name": "DDIMScheduler", **common, **own}
    learned = params["out_channels"] == 2 * params["in_channels"]
    variance = "learned_range" if learned else "fixed_small"
    return {"_class_name": "DDPMScheduler", **common, "clip_sample": True, "variance_type": variance}
