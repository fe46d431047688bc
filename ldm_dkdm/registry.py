"""The only classes that a config may name: a config, like a checkpoint, cannot run other code."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage import AutoencoderKL, VQModel
from ldm_dkdm.networks import DiT, UNet

Targets = Mapping[str, Callable[..., nn.Module]]

NETWORKS: Targets = {
    "ldm_dkdm.networks.UNet": UNet,
    "ldm_dkdm.networks.DiT": DiT,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNet,
    "guided_diffusion.unet.UNetModel": UNet,
    "models.DiT": DiT,
}
VQ_MODELS: Targets = {
    "ldm_dkdm.first_stage.VQModel": VQModel,
    "ldm.models.autoencoder.VQModel": VQModel,
    "ldm.models.autoencoder.VQModelInterface": VQModel,
    "taming.models.vqgan.VQModel": VQModel,
}
FIRST_STAGES: Targets = {
    **VQ_MODELS,
    "ldm_dkdm.first_stage.AutoencoderKL": AutoencoderKL,
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
}
TARGETS: Targets = {**NETWORKS, **FIRST_STAGES}

# Keys of the foreign classes that we do without, and the values at which they change nothing.
IGNORED: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "use_fp16": (False, True),  # precision is the trainer's business
    "use_spatial_transformer": (False,),
    "legacy": (False, True),
    "num_heads_upsample": (-1,),
    "monitor": (),
    "lossconfig": (),
    "ckpt_path": (),  # the weights come from the checkpoint that the section names
}


def resolve(
    target: Any, params: dict[str, Any], where: str, targets: Targets = TARGETS
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """The class among `targets` that `target` names and its parameters without those that mean nothing here."""
    if target not in targets:
        section = where.rpartition(".")[0]
        raise UserError(f"{section + '.' if section else ''}target: '{target}' is not one of {', '.join(targets)}")
    if not target.startswith("ldm_dkdm."):
        for key in [k for k in params if k in IGNORED]:
            if IGNORED[key] and params[key] not in IGNORED[key]:
                raise UserError(f"{where}.{key}: {params[key]!r} is not supported; remove the key")
            del params[key]
    return targets[target], params
