"""Read and write guided-diffusion's and DDPM-IP's layout: the bare state dict of a UNet."""

from pathlib import Path

import torch

from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.shapes import detached
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.checkpoints.unet_shapes import infer_unet
from ldm_dkdm.checkpoints.writing import SavedModel, require_eps_unet
from ldm_dkdm.files import replacing

NAME = "guided-diffusion / DDPM-IP"


def recognises(source: Source) -> bool:
    """Whether a file holds a UNet's bare tensors."""
    return source.kind != "folder" and {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(source.tensors)


def read(source: Source) -> Contents:
    """Infer the network from its tensors; the layout stores no noise schedule.

    Raises:
        UserError: a network of another kind, or one whose tensors are incomplete.
    """
    return Contents(
        path=source.path,
        file=source.path,
        format=NAME,
        **infer_unet(source.tensors, source.path, compvis=False),
        raw=source.tensors,
        space="pixel",
    )


def write(model: SavedModel, path: Path) -> None:
    """Write the network's state dict.

    Raises:
        UserError: another architecture, or a network that predicts v.
    """
    require_eps_unet(model, "guided-diffusion")
    with replacing(path) as temporary:
        torch.save(detached(model.network.state_dict()), temporary)
