"""Statistics of a set of images on one extractor's features, and their .npz with ADM's keys."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.evaluation.moments import SplitScores
from ldm_dkdm.files import replacing, require_place
from ldm_dkdm.npz import array_names, is_npz, read_arrays

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's keys
INCEPTION = (2048, 2023)  # features of pool_3, and of 7 channels of mixed_6/conv at 17x17


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, and what else metrics need.

    Attributes:
        count: number of images; None where a file does not say.
        mu, sigma: (D,) and (D,D) in float64; None where they are not gathered.
        mu_s, sigma_s: the same of spatial features.
        scores: sums for the Inception score.
        features: (N,D), float32, where a metric needs them one by one.
        facts: provenance.
    """

    count: int | None
    mu: np.ndarray | None = None
    sigma: np.ndarray | None = None
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None
    scores: SplitScores | None = None
    features: np.ndarray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write an .npz with ADM's keys mu, sigma, mu_s, sigma_s, and our count, scores, features, provenance."""
        named = {name: getattr(self, name) for name in (*MOMENTS, "features")}
        arrays = {name: array for name, array in named.items() if array is not None}
        for split, sums in (self.scores.state() if self.scores else {}).items():
            arrays[f"scores_{split}"] = sums
        arrays["count"] = np.array(-1 if self.count is None else self.count)
        arrays["provenance"] = np.frombuffer(json.dumps(dict(self.facts)).encode(), np.uint8)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def read(cls, path: Path, features: bool = False) -> Self:
        """Statistics of ours, or of guided-diffusion (VIRTUAL_*.npz).

        Args:
            features: read the features too.

        Raises:
            UserError: not an .npz of statistics, or values that are not finite.
        """
        found = read_arrays(path, {"arr_0", "arr_1"} | (set() if features else {"features"}))
        with blaming(path, "does not hold statistics"):
            count = int(found["count"]) if "count" in found else -1
            facts = json.loads(found["provenance"].tobytes()) if "provenance" in found else {}
        pairs: dict[str, np.ndarray] = {
            name: found[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in found
        }
        sums = {name.removeprefix("scores_"): array for name, array in found.items() if name.startswith("scores_")}
        if ("mu" in pairs) != ("sigma" in pairs) or ("mu_s" in pairs) != ("sigma_s" in pairs):
            raise UserError(f"{path}: holds {', '.join(sorted(found))}; mu and sigma (mu_s and sigma_s) come in pairs")
        pairs = {name: _checked(path, name, array) for name, array in pairs.items()}
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mean in pairs and pairs[covariance].shape != (len(pairs[mean]), len(pairs[mean])):
                raise UserError(
                    f"{path}: {covariance} {pairs[covariance].shape} does not fit {mean} {pairs[mean].shape}"
                )
        scores = SplitScores.of(sums) if sums else None
        return cls(None if count < 0 else count, **pairs, scores=scores, features=found.get("features"), facts=facts)


def require_place_for_statistics(path: Path, features: Sequence[str]) -> None:
    """Refuse a path that statistics of a set on these features could not be written to, before they are gathered.

    Raises:
        UserError: not an .npz, a file that holds anything but statistics, no permission; several features, or pixels,
            of which no statistics are gathered that another call could use.
    """
    if not is_npz(path):
        raise UserError(f"path: statistics are an .npz, {path} is not named so")
    require_place(path)
    if path.exists():
        names = array_names(path)
        if not names >= {"mu", "sigma"} or "arr_0" in names:
            raise UserError(f"path: {path} exists and does not hold statistics alone; name another file")
    if len(features) != 1:
        raise UserError(f"path: a file holds statistics of one extractor, the metrics need {', '.join(features)}")
    if features[0].startswith("pixel"):
        raise UserError(f"path: {features[0]} have no statistics that could be a reference")


def _checked(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "f" or array.ndim != (1 if name.startswith("mu") else 2) or not array.size:
        raise UserError(f"{path}: {name} is {array.dtype} {array.shape}, not the mean or covariance of features")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds values that are not finite")
    return array.astype(np.float64)
