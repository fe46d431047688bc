"""Metrics by name: what each needs of two sets of images, and how it is computed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.components import NAME as PIXEL_COMPONENTS
from ldm_dkdm.evaluation.components import require_enough
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.frechet import COMPONENTS, frechet_distance
from ldm_dkdm.evaluation.statistics import Statistics

NEIGHBOURS = 3  # Kynkaanniemi et al. 2019; guided-diffusion
SUBSETS, SUBSET_SIZE = 100, 1000  # Binkowski et al. 2018; torch-fidelity's defaults
DISTANCES = 1000  # rows of distances at once


@dataclass(frozen=True)
class Pair:
    """Statistics of both sets on one extractor's features; the reference is None for a metric without one."""

    samples: Statistics
    reference: Statistics | None
    extractor: Extractor

    @property
    def other(self) -> Statistics:
        """The reference's."""
        assert self.reference is not None  # asked for by a metric with a reference
        return self.reference


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS.

    Attributes:
        of: both sets' statistics -> figures by name; None where it does not compare features.
        meaning: one line. source: where it is defined.
        features: the extractor that defines it; None: any, chosen by the user.
        keep: whether it needs features one by one. reference: whether it compares with a second set.
        fields: of `Statistics` that it reads. least: images that each set must have.
        packages: modules of optional packages that it imports.
    """

    of: Callable[[Pair], Mapping[str, float]] | None
    meaning: str
    source: str
    features: str | None = None
    keep: bool = False
    reference: bool = True
    fields: tuple[str, ...] = ("mu", "sigma")
    least: int = 2
    packages: tuple[str, ...] = ()


def frechet(pair: Pair) -> dict[str, float]:
    """FID, or FD on other features."""
    name = "FID" if not pair.extractor.suffix else pair.extractor.titled("FD")
    return {name: _distance(pair.samples, pair.other, "mu", "sigma")}


def spatial_frechet(pair: Pair) -> dict[str, float]:
    """sFID: spatial features in place of pooled ones."""
    return {pair.extractor.titled("sFID"): _distance(pair.samples, pair.other, "mu_s", "sigma_s")}


def _distance(a: Statistics, b: Statistics, mean: str, covariance: str) -> float:
    arrays = [getattr(part, name) for part in (a, b) for name in (mean, covariance)]
    if any(array is None for array in arrays):
        raise UserError(f"metrics: {mean} and {covariance} are missing in a file of statistics")
    if arrays[0].shape != arrays[2].shape:
        raise UserError(f"metrics: statistics of {len(arrays[0])} and {len(arrays[2])} features cannot be compared")
    require_several(a, b)
    return frechet_distance(*arrays)


def require_several(*sets: Statistics) -> None:
    """Refuse a set of one image, which has no covariance.

    Raises:
        UserError: such a set.
    """
    if any(part.count == 1 for part in sets):
        raise UserError("metrics: one image has no covariance; a Frechet distance needs 2 or more")


def inception_score(pair: Pair) -> dict[str, float]:
    """IS: mean and deviation over splits of 5,000 images in turn."""
    if pair.samples.scores is None:
        raise UserError("metrics: a file of statistics has no Inception score; give its images")
    scores, name = pair.samples.scores.scores(), pair.extractor.titled("IS")
    return {name: float(scores.mean()), f"{name} std": float(scores.std())}


def precision_recall(pair: Pair) -> dict[str, float]:
    """Improved precision and recall, by torch-fidelity, on manifolds of 3 nearest neighbours."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    samples, reference = (features.float() for features in _features(pair))  # pixels are whole numbers
    if min(len(samples), len(reference)) <= NEIGHBOURS:
        raise UserError(f"metrics: precision-recall needs {NEIGHBOURS + 1} images or more in both sets")
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": DISTANCES, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(samples, reference, **options)
    counts = {"precision": len(samples), "recall": len(reference)}  # shares of whole numbers, given in float32
    return {pair.extractor.titled(name): round(found[name] * count) / count for name, count in counts.items()}


def kernel_distance(pair: Pair) -> dict[str, float]:
    """KID: mean and deviation over 100 subsets of 1,000 images, by torch-fidelity's kernel, in float64.

    Of smaller sets the subsets have the size of the smaller one. Two sets of that size are taken whole, without a
    deviation.
    """
    from torch_fidelity.metric_kid import kernel_mmd

    samples, reference = (features.numpy() for features in _features(pair))
    size = min(SUBSET_SIZE, len(samples), len(reference))
    if size < 2:
        raise UserError("metrics: kid needs 2 images or more in both sets")
    name = pair.extractor.titled("KID")
    if size == len(samples) == len(reference):
        return {name: float(kernel_mmd(samples.astype(np.float64), reference.astype(np.float64)))}
    generator = np.random.RandomState(2020)  # torch-fidelity's choice of subsets
    values = []
    for _ in range(SUBSETS):
        chosen = (x[generator.choice(len(x), size, replace=False)].astype(np.float64) for x in (samples, reference))
        values.append(kernel_mmd(*chosen))
    return {name: float(np.mean(values)), f"{name} std": float(np.std(values))}


def pixel_frechet(pair: Pair) -> dict[str, float]:
    """Frechet distance on 64 principal components of the reference's pixels."""
    require_enough(pair.samples.count, pair.other.count)
    return {"pixel Frechet": _distance(pair.samples, pair.other, "mu", "sigma")}


def _features(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N,D) and (M,D) of samples and reference."""
    a, b = pair.samples.features, pair.other.features
    assert a is not None and b is not None  # gathered, since the metric asks for them
    if a.shape[1] != b.shape[1]:
        raise UserError(f"metrics: images of {a.shape[1]} and {b.shape[1]} values cannot be compared")
    return torch.from_numpy(a), torch.from_numpy(b)


METRICS: dict[str, Metric] = {
    "fid": Metric(frechet, "Frechet distance on Inception features", "Heusel et al. 2017", "inception"),
    "sfid": Metric(
        spatial_frechet,
        "the same on 7 channels of mixed_6/conv, at all positions",
        "Nash et al. 2021",
        "inception",
        fields=("mu_s", "sigma_s"),
    ),
    "is": Metric(
        inception_score,
        "Inception score, splits of 5,000",
        "Salimans et al. 2016",
        "inception",
        reference=False,
        fields=("scores",),
        least=1,
    ),
    "fd": Metric(frechet, "Frechet distance on --features", "Heusel et al. 2017"),
    "fd-dinov2": Metric(frechet, "Frechet distance on DINOv2 features", "Stein et al. 2023", "dinov2"),
    "kid": Metric(
        kernel_distance,
        "squared MMD with a cubic kernel on --features",
        "Binkowski et al. 2018",
        keep=True,
        packages=("torch_fidelity.metric_kid",),
    ),
    "precision-recall": Metric(
        precision_recall,
        "share of samples in the reference's manifold, and the reverse",
        "Kynkaanniemi et al. 2019",
        keep=True,
        least=NEIGHBOURS + 1,
        packages=("torch_fidelity.metric_prc",),
    ),
    "pixel-frechet": Metric(
        pixel_frechet,
        "Frechet distance on 64 principal components of pixels",
        "this package",
        PIXEL_COMPONENTS,
        least=COMPONENTS + 1,
    ),
    "agreement": Metric(None, "errors of a student's eps on its teacher's chains, without data", "this package"),
    "reconstruction": Metric(
        None, "PSNR, SSIM, LPIPS and codes in use of a first stage", "Wang et al. 2004", packages=("kornia.metrics",)
    ),
}
DEFAULTS = {
    "inception": ("fid", "sfid", "is", "precision-recall", "kid"),
    "pixels": ("pixel-frechet", "precision-recall", "kid"),
    "": ("fd", "precision-recall", "kid"),
}
