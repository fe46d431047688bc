"""Write a model in another format: dkdm convert MODEL OUT --to FORMAT [key=value ...]"""

import argparse
import json
import shlex
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_dkdm.commands.arguments import add_hints, flags, load_plugins, read_hints
from ldm_dkdm.commands.hints import flat
from ldm_dkdm.commands.places import require_writable
from ldm_dkdm.config.checked import names_of
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded, replacing_in

if TYPE_CHECKING:
    from ldm_dkdm.model import DiffusionModel

FLAGS = {"format": "--to", "first_stage": "--first_stage"}
TOLERANCE = 1e-4  # largest difference from diffusers' samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the output, the format, hints."""
    parser.add_argument("source", help="anything that opens as a model")
    parser.add_argument("out", type=expanded, help="the file or folder to write; it must not exist")
    names = [name for name in names_of("ldm_dkdm.checkpoints:FORMATS") if name != "checkpoint"]  # only a run writes it
    parser.add_argument("--to", required=True, choices=names, metavar="FORMAT", help=f"one of {', '.join(names)}")
    add_hints(parser)


def run(options: argparse.Namespace) -> None:
    """Convert; a diffusers folder is compared with that library, if it is installed."""
    hints = read_hints([flat(item) for item in options.hints])
    load_plugins(options.plugin)
    convert(options.source, options.out, options.to, hints)
    print(options.out)


def convert(source: str, out: Path, to: str, hints: dict[str, Any]) -> None:
    """Write the model at a path in another format, without overwriting.

    Raises:
        UserError: no model, an output that exists, or a format that cannot hold this model.
    """
    from ldm_dkdm.checkpoints.writing import refuse_existing, require_name
    from ldm_dkdm.model import load_model

    refuse_existing(out)
    require_name(out, to)
    require_writable(out.parent, "OUT", folder=True)
    with flags(**FLAGS):
        model = load_model(source, **hints)
    if to != "diffusers":
        with flags(**FLAGS):
            model.save(out, to)
        if hints := missing_hints(model, out):
            words = " ".join(shlex.quote(f"{key}={value}") for key, value in hints.items())
            print(f"{to} holds the weights alone; whoever opens it says the rest: {words}")
        return
    with replacing_in(out.parent, out.name) as temporary:
        with flags(**FLAGS):
            model.save(temporary / out.name, to)
        _compare(temporary / out.name, model, out)


def missing_hints(model: "DiffusionModel", path: Path) -> dict[str, str]:
    """What a written file does not say of its model, as hints for `load_model` and the commands."""
    from ldm_dkdm.checkpoints import Source, read
    from ldm_dkdm.checkpoints.model_folder import known_scale
    from ldm_dkdm.config.effects import idle_keys
    from ldm_dkdm.config.schema import DiffusionConfig

    contents = read(Source(path))
    if contents.described or contents.diffusion is not None:
        return {}
    defaults = {name: one.default for name, one in signature(type(model.network)).parameters.items()}
    own, process = {**defaults, **model.node.params}, asdict(model.diffusion)
    usual = {**asdict(DiffusionConfig(space=contents.space)), "schedule": None, "num_timesteps": None}
    if process["betas"] is not None:
        process["schedule"] = None
    keys = [key for demand in contents.demands for key in demand.keys]
    found = {key: own[key] for key in keys if own.get(key, -1) not in (None, -1)}
    found |= {key: own[key] for key, value in contents.usual.items() if own.get(key, value) != value}
    if "num_head_channels" in found:
        found.pop("num_heads", None)  # the network does not read it then
    idle = idle_keys(model.diffusion)
    found |= {key: value for key, value in process.items() if value != usual[key] and key not in idle}
    if model.null_label is not None and model.null_label != getattr(model.network, "null_label", None):
        found["null_label"] = model.null_label
    if model.first_stage is not None:
        found["first_stage"] = model.first_stage.path
    if (scale := known_scale(model)) is not None:
        found["scale_factor"] = scale
    return {key: _word(value) for key, value in found.items()}


def _word(value: object) -> str:
    """A value as the command line reads it, a list without blanks."""
    if isinstance(value, (bool, list, tuple)):
        return json.dumps(value, separators=(",", ":"))
    return str(value)


def _compare(folder: Path, model: "DiffusionModel", out: Path) -> None:
    """Compare a diffusers folder with that library, if it is installed, before it becomes `out`."""
    from ldm_dkdm.evaluation.diffusers_check import largest_difference

    if model.num_classes is not None and (folder / "unet").is_dir():
        print("the model takes labels, which DDPMPipeline cannot pass: call its unet with class_labels")
    if model.num_classes not in (None, 1000) and (folder / "transformer").is_dir():
        print(f"of {model.num_classes} classes: call DiTPipeline with guidance_scale=1; it guides with label 1000")
    difference = largest_difference(folder, model)
    if difference is None:
        print("diffusers is not installed: the folder is not compared with it")
        return
    print(f"the same noise through diffusers gives the same samples to {difference:.1e}")
    if not difference <= TOLERANCE:
        raise UserError(f"{out}: diffusers' samples differ by {difference:.1e}, more than {TOLERANCE}; nothing is kept")
