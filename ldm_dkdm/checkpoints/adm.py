"""Read and write guided-diffusion's and DDPM-IP's layout: the bare state dict of a UNet."""

from pathlib import Path

from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.shapes import detached
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.checkpoints.state_dicts import UNET, Weights
from ldm_dkdm.checkpoints.unet_shapes import infer_unet
from ldm_dkdm.checkpoints.writing import SavedModel, require_eps_unet, require_name
from ldm_dkdm.files import write_torch

NAME = "guided-diffusion / DDPM-IP"


def recognises(source: Source) -> bool:
    """Whether a file holds a UNet's bare tensors."""
    return source.weights(UNET) != Weights()


def read(source: Source) -> Contents:
    """Infer the network from its tensors, its EMA among them; the layout stores no noise schedule.

    Raises:
        UserError: a network of another kind, or one whose tensors are incomplete.
    """
    found = source.weights(UNET)
    return Contents(
        path=source.path,
        file=source.path,
        format=NAME,
        **infer_unet(found.ema or found.raw or {}, source.path, compvis=False),
        ema=found.ema,
        raw=found.raw,
        space="pixel",
    )


def write(model: SavedModel, path: Path) -> None:
    """Write the network's state dict.

    Raises:
        UserError: another architecture, a network that predicts v, or a name that ends in .safetensors.
    """
    require_name(path, "adm")
    require_eps_unet(model, "guided-diffusion")
    write_torch(path, detached(model.network.state_dict()))
