"""Read and write one safetensors file whose metadata hold all that tensor shapes do not show."""

import json
from dataclasses import asdict
from pathlib import Path

from ldm_dkdm.checkpoints.as_built import require_as_built
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.model_folder import known_scale
from ldm_dkdm.checkpoints.shapes import detached, plain
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.checkpoints.writing import SavedModel
from ldm_dkdm.config.load import parse
from ldm_dkdm.config.schema import FirstStageConfig, ModelCard
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import write_tensors

NAME = "safetensors that describe themselves"
EXTRAS = ("null_label", "info", "shape", "num_classes")


def recognises(source: Source) -> bool:
    """Whether a file's metadata describe a model."""
    return {"target", "parameterization"} <= set(source.metadata)


def read(source: Source) -> Contents:
    """Read the model that the metadata describe; of its first stage they have the scale of the latents.

    Raises:
        UserError: damaged metadata.
    """
    found = source.metadata
    try:
        node = {key: found[key] for key in ("target", "parameterization")} | {"params": json.loads(found["params"])}
        card = {"weights": source.path.name, "network": node, "diffusion": json.loads(found["diffusion"])}
        card |= {key: json.loads(found[key]) for key in EXTRAS if key in found}
        described = parse(ModelCard, card, "metadata")
        stage = parse(FirstStageConfig, {"scale_factor": json.loads(found.get("scale_factor", "null"))}, "metadata")
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{source.path}: not a readable safetensors file (is it complete?): {error}") from error
    return Contents(
        path=source.path,
        file=source.path,
        format=NAME,
        target=described.network.target,
        params=described.network.params,
        parameterization=described.network.parameterization,
        raw=source.tensors,
        diffusion=described.diffusion,
        scale_factor=stage.scale_factor,
        null_label=described.null_label,
        shape=described.shape,
        num_classes=described.num_classes,
        info=described.info,
        described=True,
    )


def write(model: SavedModel, path: Path) -> None:
    """Write the file atomically, with the scale of the latents where their first stage is at hand.

    Raises:
        UserError: a network of this package that was changed after it was built.
    """
    require_as_built(model.network, model.node)
    from_card = {"null_label": model.null_label, "info": plain(model.info)}
    from_card |= {"shape": list(model.shape), "num_classes": model.num_classes}
    described = {
        "target": model.node.target,
        "params": json.dumps(plain(model.node.params)),
        "parameterization": model.node.parameterization,
        "diffusion": json.dumps(asdict(model.diffusion)),
        **{key: json.dumps(value) for key, value in from_card.items()},
    }
    if (scale := known_scale(model)) is not None:
        described["scale_factor"] = json.dumps(scale)
    write_tensors(path, detached(model.network.state_dict()), described)
