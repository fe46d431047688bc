"""The adversarial term of the first stage's loss: taming's PatchGAN."""

import torch
import torch.nn.functional as F
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn


class Discriminator(nn.Module):
    """PatchGAN with the hinge loss and VQGAN's adaptive weight (Esser et al. 2021, Eq. 6-7)."""

    def __init__(self, in_channels: int, n_layers: int = 2) -> None:
        super().__init__()
        self.net = NLayerDiscriminator(input_nc=in_channels, n_layers=n_layers).apply(weights_init)

    def discriminator_loss(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Hinge loss that separates images from reconstructions, both (B,C,H,W) in [-1,1]; a scalar."""
        real, fake = self.net(images), self.net(reconstructions.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def generator_loss(self, reconstruction_loss: Tensor, reconstructions: Tensor, last_layer: Tensor) -> Tensor:
        """The generator's term, weighted so that its gradient at the decoder's last layer matches
        that of `reconstruction_loss` (Eq. 7).
        """
        loss = -self.net(reconstructions).mean()
        rec_grad = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
        gan_grad = torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
        weight = (rec_grad.norm() / (gan_grad.norm() + 1e-4)).clamp(0, 1e4)
        return weight.detach() * loss
