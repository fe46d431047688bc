"""Feature extractors by name: networks, their pinned weights, and how images are resized for them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.evaluation.dinov2 import DinoV2
from ldm_dkdm.evaluation.efficientnet import EfficientNetLite0, packaged_weights
from ldm_dkdm.evaluation.extractor import SHORT, Extractor, Forward
from ldm_dkdm.evaluation.inception import Inception
from ldm_dkdm.evaluation.weights import INSTALL, WeightsFile, find_weights
from ldm_dkdm.files import exists, expanded
from ldm_dkdm.rng import forked_rng


@dataclass(frozen=True)
class FeatureKind:
    """An entry of FEATURES.

    Attributes:
        build: weights' file -> network; None: the pixels themselves.
        suffix: after the names of figures; empty where the field's names (FID, KID) mean these features.
        mark: a tensor that only these weights hold.
        resize: how images become the network's input.
        weights: the pinned file, where it is not part of a package.
        packaged: finds the file in a package. sha256: hash of the packaged file.
    """

    build: Callable[[Path], Forward] | None
    suffix: str
    mark: str = ""
    resize: str = "none"
    weights: WeightsFile | None = None
    packaged: Callable[[], Path] = Path
    sha256: str | None = None

    @property
    def pinned(self) -> str | None:
        """The hash of the weights that figures of this name have; None: of any."""
        return self.weights.sha256 if self.weights else self.sha256


FEATURES: dict[str, FeatureKind] = {
    "inception": FeatureKind(
        Inception,
        "",
        "Mixed_6d.branch1x1.conv.weight",
        "bilinear to 299 as TensorFlow 1",
        WeightsFile(
            "weights-inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            95_628_359,
            "the releases of github.com/toshas/torch-fidelity",
        ),
    ),
    "efficientnet-lite0": FeatureKind(
        EfficientNetLite0,
        "efficientnet",
        "_conv_stem.weight",
        "bicubic with antialiasing to 224",
        packaged=packaged_weights,
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "dinov2": FeatureKind(
        DinoV2,
        "dinov2",
        "blocks.0.ls1.gamma",
        "bicubic with antialiasing to 224",
        WeightsFile(
            "dinov2_vitl14_pretrain.pth",
            "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
            1_217_586_395,
            "github.com/facebookresearch/dinov2",
        ),
    ),
    "pixels": FeatureKind(None, "pixels"),
}


def open_extractor(features: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a name in FEATURES, or of a local file with weights of one of them.

    Figures on weights that are not the pinned ones carry the first digits of their hash in their names.

    Raises:
        UserError: an unknown name, missing weights (name, size, hash, where to put them), a file of another network.
    """
    name, given = named_features(features)
    kind, where = FEATURES[name], torch.device(device)
    if kind.build is None:
        return Extractor(name, kind.suffix, None, None, kind.resize, where)
    try:
        path = given or (find_weights(kind.weights) if kind.weights else kind.packaged())
        with forked_rng(0):  # its random weights are replaced
            forward = kind.build(path)
    except ImportError as error:
        raise UserError(f"features: {name} needs the package {error.name}; {INSTALL}") from error
    forward.network.to(where).to(memory_format=torch.channels_last)  # 1.7 times as fast on a CPU
    found = sha256(path)
    suffix = kind.suffix if kind.pinned in (None, found) else f"{kind.suffix or name}-{found[:SHORT]}"
    return Extractor(name, suffix, forward, found, kind.resize, where, given)


def named_features(features: str | Path) -> tuple[str, Path | None]:
    """A name in FEATURES, and the weights' file if one is given.

    Raises:
        UserError: an unknown name, or a file of another network.
    """
    if str(features) in FEATURES or not exists(str(features)):
        pick(FEATURES, str(features), "features")
        return str(features), None
    path = expanded(features)
    tensors = read_tensors(path)
    for name, kind in FEATURES.items():
        if kind.mark in tensors and kind.build is not None:
            return name, path
    known = ", ".join(name for name, kind in FEATURES.items() if kind.build)
    raise UserError(f"features: {path} does not hold weights of {known}")
