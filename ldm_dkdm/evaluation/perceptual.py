"""LPIPS with weights from a local file, without a download."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.weights import INSTALL, VGG16, cache_folder
from ldm_dkdm.files import expanded
from ldm_dkdm.reporting import in_home, logger
from ldm_dkdm.rng import forked_rng

LPIPS_FACTS: dict[str, str | None] = {"features": "vgg16 of LPIPS", "weights_sha256": VGG16.sha256, "resize": "none"}


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


@dataclass(frozen=True)
class Lpips:
    """LPIPS as a figure, where it can be computed.

    Attributes:
        metric: images (B,3,H,W) in [-1,1], twice -> (B,1,1,1); None where something is missing.
        missing: what that is, and where to put it; one line.
    """

    metric: nn.Module | None = field(default=None, repr=False)
    missing: str = ""


def find_lpips(file: str | Path | None = None) -> Lpips:
    """LPIPS on torchvision's VGG16 weights, in a file or in the cache of torch.hub; nothing is downloaded.

    Raises:
        UserError: `file` does not exist, or what is found has another hash than these weights.
    """
    path = cache_folder() / VGG16.name if file is None else expanded(file)
    if file is not None and not path.is_file():
        raise UserError(f"lpips: {path}: no such file; it should hold {VGG16}, from {VGG16.origin}")
    if not path.is_file():
        return Lpips(missing=f"no LPIPS: put {VGG16} in {in_home(path.parent)}, or give its path")
    if (found := sha256(path)) != VGG16.sha256:
        raise UserError(f"lpips: {path} is damaged or another file: its SHA-256 is {found}, not {VGG16.sha256}")
    try:
        with forked_rng(0):  # its random weights are replaced
            return Lpips(lpips_loss(str(path)))
    except ImportError as error:
        return Lpips(missing=f"no LPIPS: it needs the package {error.name}; {INSTALL}")


def announced(lpips: Lpips) -> Lpips:
    """The same, after a line of the log that says what is missing, if anything is."""
    if lpips.missing:
        logger.info(lpips.missing)
    return lpips
