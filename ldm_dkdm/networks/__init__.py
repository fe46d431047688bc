"""The networks that can be teacher or student: callables (x, t, label=None) -> tensor."""

from collections.abc import Callable

from torch import nn

from ldm_dkdm.networks.dit import DiT
from ldm_dkdm.networks.unet import UNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ldm_dkdm.networks.UNet": UNet,
    "ldm_dkdm.networks.DiT": DiT,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNet,
    "guided_diffusion.unet.UNetModel": UNet,
    "models.DiT": DiT,
}  # by the `target` of a config, ours and those of other code bases

__all__ = ["NETWORKS", "DiT", "UNet"]
