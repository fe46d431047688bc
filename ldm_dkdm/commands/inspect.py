"""What a checkpoint file holds, for people and as a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.diffusers_folder import is_pipeline, read_pipeline
from ldm_dkdm.checkpoints.export import read_description
from ldm_dkdm.checkpoints.folder import home_of, is_first_stage, is_model_folder, read_folder
from ldm_dkdm.checkpoints.foreign import NAMES, Foreign, open_foreign, recognise
from ldm_dkdm.checkpoints.inference import Inferred
from ldm_dkdm.checkpoints.pickles import asked_globals
from ldm_dkdm.checkpoints.reading import file_kind, read_content
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageCard, ModelCard, NetworkConfig
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.networks.cost import parameters
from ldm_dkdm.reporting import size
from ldm_dkdm.sources import make_schedule

KINDS = {"torch": "PyTorch pickle", "safetensors": "safetensors", "pickle": "plain pickle of arrays"}


def describe(path: Path) -> dict[str, str]:
    """The lines of a report, in order; nothing in the file runs.

    Raises:
        UserError: the file is unreadable or is refused. The globals that it asks for are in the message.
    """
    path = home_of(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    kind = file_kind(path)
    described = read_description(path)
    if described is not None:
        lines = {"file": f"{path}, {size(path.stat().st_size)}", "format": "safetensors that describe themselves"}
        return lines | {"weights": _count(read_tensors(path))} | _told(described.network, described.diffusion)
    content = read_content(path)
    foreign = recognise(content, path)
    lines = {"file": f"{path}, {size(path.stat().st_size)}", "format": KINDS[kind]}
    if kind != "safetensors":
        lines["pickle asks for"] = ", ".join(sorted(asked_globals(path))) or "nothing"
    lines["code base"] = NAMES[foreign.kind]
    return lines | _progress(content) | _parts(foreign) | _architecture(foreign) | _schedule(foreign)


def _folder(path: Path) -> dict[str, str]:
    """A model folder of ours or a diffusers pipeline; both describe themselves."""
    if is_pipeline(path):
        pipeline = read_pipeline(path)
        node, diffusion, tensors = pipeline.network, pipeline.diffusion, pipeline.tensors
        kind, stage = (
            "diffusers pipeline",
            "none" if pipeline.first_stage is None else _count(pipeline.first_stage.tensors),
        )
    elif is_first_stage(path):
        stage, tensors = read_folder(path, FirstStageCard)
        return {
            "folder": str(path),
            "format": "first-stage folder",
            "weights": _count(tensors),
            "architecture": stage.target,
            "parameters": ", ".join(f"{key} {value}" for key, value in stage.params.items()),
            "scale factor": str(stage.scale_factor),
        }
    elif is_model_folder(path):
        card, tensors = read_folder(path, ModelCard)
        node, diffusion = card.network, card.diffusion
        kind, stage = "model folder", card.first_stage.path if card.first_stage else "none"
    else:
        raise UserError(f"{path}: is neither a model folder (config.yaml) nor a diffusers pipeline (model_index.json)")
    return {
        "folder": str(path),
        "format": kind,
        "weights": _count(tensors),
        "first stage": stage,
    } | _told(node, diffusion)


def _told(node: NetworkConfig, diffusion: DiffusionConfig) -> dict[str, str]:
    """What a model says of itself."""
    return {
        "architecture": f"{node.target}, predicts {node.parameterization}",
        "parameters": ", ".join(f"{key} {value}" for key, value in node.params.items()),
        "noise schedule": f"{diffusion.schedule}, T = {diffusion.num_timesteps}, {diffusion.space} space",
    }


def _progress(content: object) -> dict[str, str]:
    if not isinstance(content, Mapping):
        return {}
    found = {key: content[key] for key in ("epoch", "global_step") if isinstance(content.get(key), int)}
    others = [str(key) for key in content if key not in ("state_dict", *found) and not isinstance(content[key], Tensor)]
    lines = {"training": ", ".join(f"{key} {value}" for key, value in found.items())} if found else {}
    return lines | ({"besides weights": ", ".join(others[:10])} if others else {})


def _parts(foreign: Foreign) -> dict[str, str]:
    named = {"EMA weights": foreign.ema, "weights": foreign.raw, "first stage": foreign.first_stage() or None}
    lines = {name: "none" if part is None else _count(part) for name, part in named.items()}
    scale = foreign.tensors.get("scale_factor")
    return lines if scale is None or scale.numel() != 1 else {**lines, "scale factor": f"{scale.item():g}"}


def _count(part: Mapping[str, Tensor]) -> str:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.values()})
    total = sum(tensor.numel() for tensor in part.values())
    return f"{len(part)} tensors, {total / 1e6:.6f} M numbers, {' and '.join(kinds)}"


def _architecture(foreign: Foreign) -> dict[str, str]:
    inferred = foreign.infer()
    with torch.device("meta"):
        network = build({"target": inferred.target, "params": _buildable(inferred)}, NETWORKS)
    missing = "; ".join(f"{' or '.join(d.keys)} ({d.hint})" for d in inferred.demands)
    return {
        "architecture": f"{inferred.target}, {parameters(network) / 1e6:.6f} M parameters",
        "inferred": ", ".join(f"{key} {value}" for key, value in inferred.params.items()),
        "cannot be inferred": missing or "nothing",
    }


def _buildable(inferred: Inferred) -> dict[str, Any]:
    """Parameters with stand-ins that change no shape, so that the network can be counted."""
    params = {"num_heads": 1, **inferred.params}
    if inferred.target.endswith("UNet"):
        return {**params, "image_size": 2 ** len(params["channel_mult"])}
    return params


def _schedule(foreign: Foreign) -> dict[str, str]:
    stored, found = foreign.alphas_cumprod, foreign.diffusion()
    if stored is None:
        return {"noise schedule": "not stored; set the diffusion section"}
    ends = f"T = {len(stored)}, alphas_cumprod {stored[0]:.6f} ... {stored[-1]:.6f}"
    if found is None:
        return {"noise schedule": f"{ends}, none that has a name here"}
    error = (make_schedule(found).alphas_cumprod - stored.double()).abs().max()
    name = found.schedule if found.schedule == "cosine" else f"{found.schedule} {found.beta_start} ... {found.beta_end}"
    return {"noise schedule": f"{ends}: {name} (largest difference {error:.1e})"}


def as_config(path: Path) -> str:
    """The sections that name a file, as YAML; what it does not tell is marked `???`."""
    path = home_of(path)
    if path.is_dir() and is_first_stage(path):
        return yaml.safe_dump({"first_stage": {"ckpt": str(path)}})
    if is_model_folder(path) or is_pipeline(path) or (path.is_file() and read_description(path) is not None):
        return yaml.safe_dump({"teacher": {"ckpt": str(path)}})  # it tells the rest itself
    foreign = open_foreign(path)
    inferred, diffusion = foreign.infer(), foreign.diffusion()
    params = {**inferred.usual, **inferred.params, **{demand.keys[0]: "???" for demand in inferred.demands}}
    tree: dict[str, Any] = {"teacher": {"ckpt": str(path), "target": inferred.target, "params": params}}
    if diffusion is not None:
        tree["diffusion"] = {key: getattr(diffusion, key) for key in ("schedule", "num_timesteps")}
        if diffusion.schedule != "cosine":
            tree["diffusion"] |= {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
    else:
        space = "latent" if foreign.kind == "compvis" else "pixel"
        tree["diffusion"] = {"space": space, "schedule": "???", "num_timesteps": "???"}
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)
    for demand in inferred.demands:
        other = f"or {demand.keys[1]}; " if len(demand.keys) > 1 else ""
        text = f"# {demand.keys[0]}: {other}{demand.hint}\n{text}"
    return text


def print_report(path: Path, config: bool) -> None:
    """Print the report of a file, or its config."""
    with blaming(path):
        if config:
            print(as_config(path), end="")
            return
        lines = describe(path)
    width = max(map(len, lines))
    for subject, value in lines.items():
        print(f"{subject:<{width}}  {value}")
