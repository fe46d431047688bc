"""Inception-v3 of the FID (Heusel et al. 2017), by torch-fidelity, with the tensors that guided-diffusion reads."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.errors import blaming
from ldm_dkdm.evaluation.extractor import Features

SPATIAL_CHANNELS = 7  # the first channels of mixed_6/conv, as in guided-diffusion


class Inception:
    """Images -> pool_3 (2048), mixed_6/conv's first 7 channels (17*17*7, last channels fastest), logits (1008).

    torch-fidelity's port of TensorFlow's graph of 2015-12-05: TensorFlow 1's bilinear resize to 299 and (x - 128) / 128
    are its first layers. `mixed_6/conv` is its `Mixed_6d.branch1x1`, after the ReLU; it is flattened as TensorFlow's
    (H,W,C), so that stored mu_s and sigma_s fit. The logits leave the bias out, as guided-diffusion's do.

    Raises:
        UserError: a file whose tensors are not this network's.
    """

    def __init__(self, path: Path) -> None:
        from torch_fidelity import FeatureExtractorInceptionV3

        buffer = io.BytesIO()  # torch-fidelity unpickles what it is given; these are plain tensors
        torch.save(read_tensors(path), buffer)
        buffer.seek(0)
        names = ["2048", "logits_unbiased"]
        with blaming(path, "does not hold the tensors of the FID's Inception-v3"):
            self.network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", names, feature_extractor_weights_path=buffer
            )
        self._spatial: Tensor | None = None
        self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 (B,3,H,W) -> features."""
        pooled, logits = self.network(images)
        return Features(pooled, self._spatial, logits)
