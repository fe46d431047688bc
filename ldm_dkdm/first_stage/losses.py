"""The learned terms of the first stage's loss: taming's PatchGAN and LPIPS."""

from pathlib import Path

import torch
import torch.nn.functional as F
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn

from ldm_dkdm.errors import UserError


class Discriminator(nn.Module):
    """PatchGAN with the hinge loss and VQGAN's adaptive weight (Esser et al. 2021, Eq. 6-7)."""

    def __init__(self, in_channels: int, n_layers: int = 2) -> None:
        super().__init__()
        self.net = NLayerDiscriminator(input_nc=in_channels, n_layers=n_layers).apply(weights_init)

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Hinge loss that tells images from reconstructions, both (B,C,H,W) in [-1,1]; a scalar."""
        real, fake = self.net(images), self.net(reconstructions.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def generator_loss(self, reconstruction_loss: Tensor, reconstructions: Tensor, last_layer: Tensor) -> Tensor:
        """The generator's term, weighted so that its gradient at the decoder's last layer matches
        that of `reconstruction_loss` (Eq. 7)."""
        loss = -self.net(reconstructions).mean()
        rec_grad = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
        gan_grad = torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
        weight = (rec_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(0, 1e4)
        return weight.detach() * loss


def lpips_loss(backbone: str | None) -> nn.Module:
    """LPIPS (Zhang et al. 2018) on VGG16 features, frozen.

    Args:
        backbone: a local file with torchvision's VGG16 weights. The `lpips` package ships only the
            linear heads.
    """
    if backbone is None or not Path(backbone).is_file():
        raise UserError(
            f"first_stage loss: LPIPS needs torchvision's VGG16 weights (vgg16-397923af.pth) at "
            f"perceptual_backbone={backbone}; put the file there or set perceptual: 0"
        )
    import lpips  # needs torchvision: imported only where it is used
    from torchvision.models import vgg16

    network = vgg16()
    network.load_state_dict(torch.load(backbone, map_location="cpu", weights_only=True))
    metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    slices = [getattr(metric.net, f"slice{i}") for i in range(1, 6)]
    for part in slices:
        for index, layer in part.named_children():
            layer.load_state_dict(network.features[int(index)].state_dict())
    return metric.eval().requires_grad_(False)
