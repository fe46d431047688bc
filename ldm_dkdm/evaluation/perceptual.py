"""LPIPS with weights from a local file, without a download."""

import warnings
from pathlib import Path

from torch import nn

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.errors import UserError


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

    features = vgg16(init_weights=False).features
    prefix = "features."
    tensors = {k.removeprefix(prefix): v for k, v in read_tensors(backbone).items() if k.startswith(prefix)}
    load_strictly(features, tensors, backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips uses deprecated arguments of torchvision
        metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for i in range(1, 6):
        for index, layer in getattr(metric.net, f"slice{i}").named_children():
            layer.load_state_dict(features[int(index)].state_dict())
    return metric.eval().requires_grad_(False)
