"""How alike two sets of images are, pair by pair: PSNR, SSIM, and LPIPS where its weights are there."""

import torch
from torch import Tensor, nn

WINDOW = 11  # pixels of SSIM's window
LEAST_SIDE = 6  # pixels; SSIM's window mirrors 5 of them at each border
LEAST_LPIPS = 16  # pixels; VGG16 halves the sides four times
AT_ONCE = 8  # pairs in a call of LPIPS
MOST = 100.0  # dB, of equal images


@torch.no_grad()
def likeness(images: Tensor, others: Tensor, lpips: nn.Module | None = None) -> dict[str, Tensor]:
    """Figures (B,) of pairs of images uint8 (B,H,W,C), by name; those that a size does not allow are left out.

    - psnr: 10 log10(1 / MSE) in dB on [0,1], at most 100.
    - ssim: Wang et al. 2004, Gaussian window of 11 pixels, mirrored borders, mean over channels; by kornia. Sides of 6
      or more.
    - lpips: Zhang et al. 2018 on VGG16, if given. Sides of 16 or more; 1 or 3 channels.

    Raises:
        ImportError: kornia is not installed.
    """
    from kornia.metrics import ssim  # takes a second

    a, b = (x.movedim(-1, 1).float().cpu() / 255 for x in (images, others))
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    figures = {"psnr": (-10 * error.log10()).clamp(max=MOST)}
    side, channels = min(a.shape[2:]), a.shape[1]
    if side >= LEAST_SIDE:
        figures["ssim"] = ssim(a, b, WINDOW).flatten(1).mean(1).double()
    if lpips is not None and side >= LEAST_LPIPS and channels in (1, 3):
        pairs = zip(*((2 * x - 1).expand(-1, 3, -1, -1).split(AT_ONCE) for x in (a, b)), strict=True)
        figures["lpips"] = torch.cat([lpips(*pair).flatten() for pair in pairs]).double()
    return figures
