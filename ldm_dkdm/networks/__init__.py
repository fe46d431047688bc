"""The networks that can be teacher or student: callables (x, t, label=None) -> tensor."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from ldm_dkdm.networks.dit import DiT
from ldm_dkdm.networks.unet import UNet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ldm_dkdm.networks.UNet": UNet,
    "ldm_dkdm.networks.DiT": DiT,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": UNet,
    "guided_diffusion.unet.UNetModel": UNet,
    "models.DiT": DiT,
}  # `target` of a config, ours or another code base's -> class


class Network(Protocol):
    """The interface of the package's own networks; a plain nn.Module has only the call."""

    in_channels: int
    out_channels: int
    image_size: int
    num_classes: int | None

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """States x (B,in_channels,H,W), timesteps t (B,), labels (B,) -> (B,out_channels,H,W)."""


__all__ = ["NETWORKS", "DiT", "Network", "UNet"]
