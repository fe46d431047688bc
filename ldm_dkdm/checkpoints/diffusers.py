"""Read and write diffusers folders without the library: a pipeline, or one UNet2DModel."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.diffusers_first_stage import component
from ldm_dkdm.checkpoints.diffusers_scheduler import process, scheduler_config
from ldm_dkdm.checkpoints.diffusers_unet import to_ours, to_theirs, unet_config, unet_params
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.reading import read_tensors, weights_in
from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.checkpoints.source import Source, read_json
from ldm_dkdm.checkpoints.writing import SavedModel, refuse_existing
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.files import write_tensors, write_text
from ldm_dkdm.networks import DiT, UNet

NAME = "diffusers folder"
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
    diffusion, parameterization = process(
        folder / "scheduler" / "scheduler_config.json", space, params["out_channels"] == 2 * params["in_channels"]
    )
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


def write(model: SavedModel, path: Path) -> None:
    """Write an `LDMPipeline` (with a first stage) or a `DDPMPipeline` folder, atomically.

    Raises:
        UserError: a model that diffusers' classes cannot express, or a folder that exists.
    """
    refuse_existing(path)
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
