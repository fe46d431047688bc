"""Read and write diffusers folders without the library: a pipeline, or one UNet2DModel."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints import diffusers_dit
from ldm_dkdm.checkpoints.as_built import require_as_built
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.diffusers_first_stage import component, first_stage_part
from ldm_dkdm.checkpoints.diffusers_scheduler import process, require_process, scheduler_config
from ldm_dkdm.checkpoints.diffusers_unet import to_ours, to_theirs, unet_config, unet_params
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.reading import read_tensors
from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.checkpoints.source import Source, read_json
from ldm_dkdm.checkpoints.state_dicts import unwrapped
from ldm_dkdm.checkpoints.weight_files import weights_in
from ldm_dkdm.checkpoints.writing import SavedModel, refuse_existing, require_plain_timesteps
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.files import replacing_in, write_tensors, write_text
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.reporting import logger

NAME = "diffusers folder"
UNET, TARGET = "UNet2DModel", "ldm_dkdm.networks.UNet"
PARTS = ("unet", "transformer")  # names of the network's folder in a pipeline
INDEX = "model_index.json"
NOTES = "ldm_dkdm.json"  # what diffusers' files have no key for; the library does not read it
NOTED = ("null_label", "info")


def recognises(source: Source) -> bool:
    """Whether the path is a pipeline's folder, a trainer's checkpoint, one network's folder, or the weights in it."""
    if not source.is_folder:
        return source.path.is_file() and _class_in(source.path.parent) in (UNET, *diffusers_dit.CLASSES)
    return _class_in(source.path) is not None or source.holds(INDEX) or bool(_networks(source.path))


def _class_in(folder: Path) -> str | None:
    """The class that a folder's config.json names."""
    path = folder / "config.json"
    return read_json(path).get("_class_name") if path.is_file() else None


def _networks(folder: Path) -> list[str]:
    """The folders of networks in a trainer's checkpoint-N."""
    return [name for name in ("unet", "unet_ema") if (folder / name / "config.json").is_file()]


def read(source: Source) -> Contents:
    """A pipeline of a UNet2DModel or a DiT, a scheduler and, for latents, a first stage; or such a network alone.

    Raises:
        UserError: a missing part or an unsupported option; names the file and the key.
    """
    with blaming(source.path, "a config in it is incomplete or does not fit its weights"):
        folder = source.path if source.is_folder else source.path.parent
        if (folder / INDEX).is_file():
            return _pipeline(folder, _network_of(folder), None if source.is_folder else source.path)
        if _class_in(folder) is None:
            return _checkpoint(folder)
        file = weights_in(folder) if source.is_folder else source.path
        return _network(folder, file, path=source.path)


def _network_of(pipeline: Path) -> Path:
    """The folder of a pipeline's network: its part, or the root in the first layout of diffusers."""
    part = next((pipeline / name for name in PARTS if (pipeline / name).is_dir()), pipeline / PARTS[0])
    if (pipeline / "unet_ema").is_dir():
        logger.warning("%s: unet is read; name %s to read that", pipeline, pipeline / "unet_ema")
    return part if part.is_dir() or not (pipeline / "config.json").is_file() else pipeline


def _pipeline(home: Path, unet: Path, file: Path | None = None) -> Contents:
    _require_network(home)
    return _network(unet, file or weights_in(unet), path=home, home=home)


def _checkpoint(folder: Path) -> Contents:
    """A trainer's checkpoint-N: raw and EMA weights; the folder around it may be the pipeline."""
    *_, last = names = _networks(folder)
    contents = _network(folder / last, weights_in(folder / last), path=folder)
    if last == "unet":
        return contents
    other = _network(folder / "unet", weights_in(folder / "unet"), path=folder) if len(names) > 1 else None
    raw, file = (None, None) if other is None else (other.raw, other.file)
    return replace(contents, ema=contents.raw, raw=raw, raw_file=file)


def _network(folder: Path, file: Path, path: Path, home: Path | None = None) -> Contents:
    """One network, with all else of the pipeline `home` that it belongs to; alone, it has no noise schedule."""
    home = home or next((place for place in folder.parents[:2] if _is_home(place, folder)), None)
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    if home is not None and (home / NOTES).is_file():
        notes = read_json(home / NOTES)
    network = _read_network(folder, file, notes)
    params = network["params"]
    found: dict[str, Any] = {"path": path, "file": file, "format": NAME, **network}
    if home is None:
        return Contents(**found, space="pixel" if network["target"] == TARGET else "latent")
    index = read_json(home / INDEX)
    stage = first_stage_part(index)
    learned = params.get("learn_sigma", params.get("out_channels") == 2 * params["in_channels"])
    diffusion, kind = process(_scheduler(home), "pixel" if stage is None else "latent", learned)
    if isinstance(own := index.get("scheduler"), list) and own[:1] == ["diffusers"]:
        require_process(own[-1], f"{home / INDEX}: scheduler")
    notes = {"info": _label_names(index), **{key: notes[key] for key in NOTED if notes.get(key) is not None}}
    return Contents(
        **found,
        parameterization=kind,
        diffusion=diffusion,
        first_stage=None if stage is None else FirstStageSource(home),
        **notes,
        described=True,
    )


def _is_home(place: Path, network: Path) -> bool:
    """Whether a folder is the pipeline around a network's folder: PIPELINE/unet, PIPELINE/checkpoint-N/unet_ema."""
    known = network.name in (*PARTS, "unet_ema") and network.parent in (place, *place.glob("checkpoint-*"))
    return known and (place / INDEX).is_file()


def _scheduler(home: Path) -> Path:
    names = [home / "scheduler" / "scheduler_config.json", home / "scheduler_config.json"]
    found = next((path for path in names if path.is_file()), None)
    if found is None:
        raise UserError(f"{names[0]}: is missing; it holds the noise schedule")
    return found


def _read_network(folder: Path, file: Path, notes: dict[str, Any]) -> dict[str, Any]:
    """Target, params and tensors of a network, under our names."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: is missing; it describes the network")
    config = read_json(path)
    kind = config.get("_class_name")
    if kind in diffusers_dit.CLASSES:
        stored, described = unwrapped(read_tensors(file)), diffusers_dit.dit_params(config, path)
        params, tensors = diffusers_dit.dit_to_ours(stored, described, folder)
        return {"target": diffusers_dit.TARGET, "params": params, "raw": tensors}
    if kind != UNET:
        raise UserError(f"{folder}: is a {kind}; only {UNET} and {diffusers_dit.CLASSES[0]} work")
    order = {"use_new_attention_order": True} if notes.get("use_new_attention_order") else {}
    params = {**unet_params(config, path), **order}
    return {"target": TARGET, "params": params, "raw": to_ours(unwrapped(read_tensors(file)), params, folder)}


def _label_names(index: dict[str, Any]) -> dict[str, Any]:
    """The names of a DiTPipeline's labels as a fact for the card: `0 tench`, the first of each label's words."""
    names = index.get("id2label")
    if not isinstance(names, dict) or not all(key.isdigit() for key in names):
        return {}
    return {"classes": [f"{key} {str(names[key]).split(',')[0]}" for key in sorted(names, key=int)]}


def _require_network(home: Path) -> None:
    """Refuse pipelines of other networks, by their class."""
    index = read_json(home / INDEX)
    other = (index.get("transformer") or [None, None])[1]
    if "scheduler" in index and ("unet" in index or other in diffusers_dit.CLASSES):
        return
    kind = index.get("_class_name")
    advice = f"; its network is a {other}" if other else ""
    raise UserError(f"{home}: a {kind} is not a pipeline of an unconditional or class-conditional UNet or DiT{advice}")


def write(model: SavedModel, path: Path) -> None:
    """Write an `LDMPipeline` (with a first stage), a `DDPMPipeline` or a `DiTPipeline` folder, atomically.

    Raises:
        UserError: a model that diffusers' classes cannot express, or a folder that exists.
    """
    refuse_existing(path)
    require_plain_timesteps(model, "diffusers")
    index, parts = _network_part(model)
    if model.space.encoded:
        codec = model.codec()
        stage = component(codec.params, codec.autoencoder.state_dict(), codec.scale_factor)
        parts["vae" if isinstance(model.network, DiT) else "vqvae"] = stage
    scheduler = scheduler_config(model)
    with replacing_in(path.parent, path.name) as home:
        temporary = home / path.name
        for name, (config, tensors) in parts.items():
            _write_json(temporary / name / "config.json", config)
            write_tensors(temporary / name / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        classes = {name: config["_class_name"] for name, (config, _) in parts.items()}
        classes["scheduler"] = scheduler["_class_name"]
        _write_json(
            temporary / "model_index.json", index | {name: ["diffusers", kind] for name, kind in classes.items()}
        )
        _write_json(temporary / NOTES, _notes(model))


def _network_part(model: SavedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The beginning of model_index.json, and the network's part: its config and tensors."""
    if type(model.network) not in (DiT, UNet):  # a subclass may compute something else
        raise UserError(f"format: diffusers has no {type(model.network).__name__}; choose safetensors")
    require_as_built(model.network, model.node)
    tensors = model.network.state_dict()
    if isinstance(model.network, DiT):
        if not model.space.encoded:
            raise UserError("format: diffusers' DiTPipeline has no pixel-space models; choose safetensors")
        part = diffusers_dit.dit_config(model.node.params), diffusers_dit.dit_to_theirs(tensors)
        named = [str(name).partition(" ") for name in model.info.get("classes") or []]
        labels = {key: name for label, (key, _, name) in enumerate(named) if key == str(label) and name}
        return {"_class_name": "DiTPipeline", **({"id2label": labels} if labels else {})}, {PARTS[1]: part}
    index = {"_class_name": "LDMPipeline" if model.space.encoded else "DDPMPipeline"}
    return index, {PARTS[0]: (unet_config(model.node.params), to_theirs(tensors, model.node.params))}


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_text(path, json.dumps(tree, indent=2) + "\n")


def _notes(model: SavedModel) -> dict[str, Any]:
    order = bool(model.node.params.get("use_new_attention_order", False))
    own = {key: plain(getattr(model, key)) for key in NOTED}
    return {"use_new_attention_order": order, **own}
