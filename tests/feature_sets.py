"""A small feature extractor with every kind of feature, and statistics of given features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.extractor import Extractor, Features
from ldm_dkdm.evaluation.features import FEATURES, FeatureKind
from ldm_dkdm.evaluation.metrics import Pair
from ldm_dkdm.evaluation.statistics import Statistics

D, S, C = 6, 4, 5  # features, spatial features, classes of the toy


class Toy:
    """Fixed random projections of the mean pixels of 4x4 tiles; counts the images that it sees."""

    seen = 0

    def __init__(self, path: Path | None = None) -> None:
        self.network = nn.Identity()
        generator = torch.Generator().manual_seed(0)
        self.maps = [torch.randn(48, width, generator=generator) for width in (D, S, C)]

    def __call__(self, images: Tensor) -> Features:
        Toy.seen += len(images)
        tiles = nn.functional.adaptive_avg_pool2d(images.double() / 255, 4).flatten(1).float()
        return Features(*(torch.tanh(tiles @ weights) for weights in self.maps))


def add_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the toy in the table, as a package of one's own would."""
    Toy.seen = 0
    monkeypatch.setitem(FEATURES, "toy", FeatureKind(Toy, "toy", "toy.mark", packaged=lambda: Path(__file__)))


def toy_extractor() -> Extractor:
    return Extractor("toy", "toy", Toy(), "0" * 64, "none", torch.device("cpu"))


class Given:
    """An extractor whose features are the numbers that stand in the place of images (B,1,1,D+S+C)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        self.widths, self.moments = widths, True

    def __call__(self, images: Tensor) -> Features:
        pooled, *others = images.flatten(1).split(list(self.widths), 1)
        return Features(pooled, *(part if part.shape[1] else None for part in others))


def collected(features: np.ndarray, batch: int = 7, widths: tuple[int, int, int] | None = None) -> Statistics:
    """Statistics of features (N,D) or, with widths, of pooled, spatial and logits beside each other (N,D+S+C)."""
    widths = widths or (features.shape[1], 0, 0)
    collector = Collector(Given(widths), keep=True)  # type: ignore[arg-type]  # an extractor of another kind
    images = torch.from_numpy(features)[:, None, None]
    for first in range(0, len(images), batch):
        collector.add(images[first : first + batch], first)
    return collector.statistics(len(images), {})


def pair(a: Statistics, b: Statistics | None = None, suffix: str = "") -> Pair:
    """Both sets on extractors of this suffix; none stands for the FID's own weights."""
    return Pair(a, b, Extractor("inception", suffix, None, None, "none", torch.device("cpu")))
