"""Say what is in a checkpoint: dkdm inspect PATH [--config]. No code in a file is run."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_dkdm.commands.arguments import add_plugin_argument, load_plugins
from ldm_dkdm.errors import UserError, blaming, legible, naming

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm_dkdm.checkpoints import Contents, Source

KINDS = {"torch": "PyTorch pickle", "safetensors": "safetensors", "pickle": "plain pickle of arrays"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The path, and whether a config is wanted."""
    parser.add_argument("file", metavar="PATH", help="anything that opens as a model, or a first stage")
    parser.add_argument("others", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--config", action="store_true", help="print its config sections instead")
    add_plugin_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Print the report of a path, or its config."""
    for other in options.others:
        hint = "=" in other and not Path(other).exists()
        why = "it reports what the file says; hints are for the commands that open it" if hint else "one PATH a call"
        raise UserError(f"{other}: not an argument of inspect; {why}")
    load_plugins(options.plugin)
    with blaming(options.file):
        if options.config:
            print(as_config(options.file), end="")
            return
        lines = describe(options.file)
    width = max(map(len, lines))
    for subject, value in lines.items():
        print(f"{subject:<{width}}  {legible(value)}")


def describe(path: str) -> dict[str, str]:
    """The lines of a report, in order.

    Raises:
        UserError: a missing file, or one that is refused; the message lists the globals that it names.
    """
    from ldm_dkdm.checkpoints import Source, read, super_resolution

    source = Source(path)
    if is_first_stage(source):
        return _first_stage(source)
    contents = read(source)
    lines = {"path": str(source.path), "format": contents.format} | _file(source) | _progress(source) | _parts(contents)
    doubt = super_resolution(contents)
    return lines | _architecture(contents) | _process(contents) | ({"not supported": doubt} if doubt else {})


def is_first_stage(source: "Source") -> bool:
    """Whether a path is a first-stage folder, ours or diffusers', or the weights in one of diffusers'."""
    from ldm_dkdm.checkpoints.diffusers_first_stage import CLASSES
    from ldm_dkdm.checkpoints.first_stages import is_first_stage_folder, is_of_diffusers

    if not source.is_folder:
        return source.path.is_file() and (source.path.parent / "config.json").is_file() and is_of_diffusers(source)
    theirs = source.holds("config.json") and source.json("config.json").get("_class_name") in CLASSES
    return theirs or is_first_stage_folder(source.path)


def _first_stage(source: "Source") -> dict[str, str]:
    from ldm_dkdm.checkpoints.first_stages import FirstStageSource

    stage = FirstStageSource(source.path).opened()
    stage.codec()  # refuses tensors and parameters that do not fit
    return {
        "path": str(source.path),
        "format": "first-stage folder" if source.is_folder else "weights in a first-stage folder",
        "weights": _count(stage.tensors or {}),
        "architecture": str(stage.target),
        "parameters": ", ".join(f"{key} {value}" for key, value in stage.params.items()),
        "scale factor": f"{stage.scale_factor or 1:g}" + _doubted(stage.doubt),
    }


def _file(source: "Source") -> dict[str, str]:
    """What kind of file it is, and what a pickle asks for."""
    from ldm_dkdm.checkpoints.pickles import asked_globals
    from ldm_dkdm.checkpoints.weight_files import files_of
    from ldm_dkdm.reporting import size

    if source.is_folder:
        return {}
    if source.kind == "index":
        files = files_of(source.path)
        return {"file": f"index of {len(files)} shards, {size(sum(file.stat().st_size for file in files))}"}
    lines = {"file": f"{KINDS[source.kind]}, {size(source.path.stat().st_size)}"}
    if source.kind != "safetensors":
        lines["pickle asks for"] = ", ".join(sorted(asked_globals(source.path))) or "nothing"
    return lines


def _progress(source: "Source") -> dict[str, str]:
    from torch import Tensor

    content = None if source.kind == "index" else source.content
    if not isinstance(content, Mapping):
        return {}
    found = {key: content[key] for key in ("epoch", "global_step") if isinstance(content.get(key), int)}
    others = [str(key) for key in content if key not in ("state_dict", *found) and not isinstance(content[key], Tensor)]
    lines = {"training": ", ".join(f"{key} {value}" for key, value in found.items())} if found else {}
    return lines | ({"besides weights": ", ".join(others[:10])} if others else {})


def _parts(contents: "Contents") -> dict[str, str]:
    named = {"EMA weights": contents.ema, "weights": contents.raw}
    lines = {name: "none" if part is None else _count(part) for name, part in named.items()}
    stage = contents.first_stage
    if stage is None:
        return lines | {"first stage": "none"}
    inside = "none" if stage.path == contents.path and stage.tensors is None else str(stage.path)
    if stage.path == contents.path and stage.path.is_dir():  # a part of the same pipeline
        stage = stage.opened(_side(contents))
    lines["first stage"] = inside if stage.tensors is None else _count(stage.tensors)
    return lines if stage.scale is None else lines | {"scale factor": f"{stage.scale:g}{_doubted(stage.doubt)}"}


def _side(contents: "Contents") -> int | None:
    """The side of the states, where it is known."""
    found = contents.params.get("image_size", contents.params.get("input_size"))
    return found if isinstance(found, int) else None


def _doubted(doubt: str) -> str:
    return f" ({doubt}; the teacher check and sampling compare it with samples)" if doubt else ""


def _count(part: "Mapping[str, Tensor]") -> str:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.values()})
    total = sum(tensor.numel() for tensor in part.values())
    return f"{len(part)} tensors, {total / 1e6:.6f} M numbers, {' and '.join(kinds)}"


def _architecture(contents: "Contents") -> dict[str, str]:
    known = ", ".join(f"{key} {value}" for key, value in contents.params.items())
    missing = "; ".join(f"{' or '.join(d.keys)} ({d.hint})" for d in contents.missing({}))
    wanted = {key for demand in contents.demands for key in demand.keys}
    beside = ", ".join(f"{key} {value}" for key, value in contents.usual.items() if key in wanted)
    network = _built(contents)
    own = None if missing else getattr(network, "null_label", None)  # where nothing is guessed
    null = own if contents.null_label is None else contents.null_label
    weights = contents.raw if contents.ema is None else contents.ema
    count = sum(part.numel() for part in ((weights or {}).values() if network is None else network.parameters()))
    predicts = "" if contents.parameterization is None else f", predicts {contents.parameterization}"
    return {
        "architecture": f"{contents.target}, {count / 1e6:.6f} M parameters{predicts}",
        "parameters" if contents.described else "inferred": known,
        **({} if null is None else {"null label": str(null)}),
        **({"from the config beside it": beside} if beside else {}),
        **({} if contents.described else {"cannot be inferred": missing or "nothing"}),
    }


def _built(contents: "Contents") -> "nn.Module | None":
    """The network without values; None for a network of the user's own. Unknown arguments change no shape."""
    import torch

    from ldm_dkdm.checkpoints import Hints
    from ldm_dkdm.config.registry import build
    from ldm_dkdm.networks import NETWORKS

    kind = NETWORKS.get(contents.target)
    if kind is None or not kind.__module__.startswith("ldm_dkdm."):
        return None
    if not contents.missing({}):
        with naming(str(contents.path)), torch.device("meta"):
            return build(contents.network(Hints()), NETWORKS, "params")  # refuses bad values
    params = {"num_heads": 1, **contents.params}
    if contents.target.endswith("UNet"):
        params = {**params, "image_size": 2 ** len(params["channel_mult"])}
    with torch.device("meta"):
        return build({"target": contents.target, "params": params}, NETWORKS)


def _process(contents: "Contents") -> dict[str, str]:
    from ldm_dkdm.checkpoints.contents import schedule_of
    from ldm_dkdm.checkpoints.process_keys import own_sampling

    stored, found = contents.alphas_cumprod, contents.diffusion
    if found is None:
        return {"noise schedule": "not stored; give it as schedule=... or in the diffusion section"}
    name = "its own betas" if found.betas is not None else found.schedule
    if name in ("scaled_linear", "linear"):
        name += f" {found.beta_start} ... {found.beta_end}"
    shown = f"{name}, T = {found.num_timesteps}, {found.space} space"
    shown += "".join(f", {key} {str(getattr(found, key)).lower()}" for key in own_sampling(found))
    with naming(str(contents.path)):
        schedule = schedule_of(found)  # refuses what no command opens
    if stored is None:
        return {"noise schedule": shown}
    error = (schedule.alphas_cumprod - stored.double()).abs().max()
    return {"noise schedule": f"{shown}; alphas_cumprod {stored[0]:.6f} ... {stored[-1]:.6f}, differs by {error:.1e}"}


def as_config(path: str) -> str:
    """The config sections of a model, as YAML; unknown values are `???`."""
    import yaml

    from ldm_dkdm.checkpoints import Source, read, super_resolution

    source = Source(path)
    if is_first_stage(source):
        return yaml.safe_dump({"first_stage": {"ckpt": str(source.path)}})
    contents = read(source)
    if contents.described:
        return yaml.safe_dump({"teacher": {"ckpt": str(source.path)}})  # it describes itself
    params = {**contents.usual, **contents.params, **{demand.keys[0]: "???" for demand in contents.missing({})}}
    tree: dict[str, Any] = {"teacher": {"ckpt": str(source.path), "target": contents.target, "params": params}}
    tree["diffusion"] = _process_section(contents)
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)
    for demand in contents.missing({}):
        other = f"or {demand.keys[1]}; " if len(demand.keys) > 1 else ""
        text = f"# {demand.keys[0]}: {other}{demand.hint}\n{text}"
    doubt = super_resolution(contents, "diffusion.space")
    return f"# {doubt}\n{text}" if doubt else text


def _process_section(contents: "Contents") -> dict[str, Any]:
    from ldm_dkdm.checkpoints.process_keys import own_sampling
    from ldm_dkdm.config.schema import DiffusionConfig

    found = contents.diffusion
    if found is None:
        return {"space": contents.space, "schedule": "???", "num_timesteps": "???"}
    own = {key: getattr(found, key) for key in own_sampling(found)}
    if found.space != DiffusionConfig.space:
        own = {"space": found.space, **own}
    if found.betas is not None:
        return {"betas": list(found.betas), **own}
    ends = {} if found.schedule == "cosine" else {"beta_start": found.beta_start, "beta_end": found.beta_end}
    return {"schedule": found.schedule, "num_timesteps": found.num_timesteps, **ends, **own}
