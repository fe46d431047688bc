"""Sums over images in constant memory: mean and covariance of features, Inception scores of splits."""

from collections.abc import Mapping
from typing import Self

import numpy as np

SPLIT = 5000  # images in a split of the Inception score (guided-diffusion)
Arrays = Mapping[str, np.ndarray]


class Moments:
    """Count, mean (D,) and scatter (D,D) = sum of (x - mean)(x - mean)^T of features, in float64.

    Parts are joined by Chan et al. 1983, Eq. 2.1, so the order of the images matters only by rounding.
    """

    def __init__(self, count: int = 0, mean: np.ndarray | None = None, scatter: np.ndarray | None = None) -> None:
        self.count = count
        self._mean, self._scatter = mean, scatter

    def add(self, features: np.ndarray) -> None:
        """Count features (B,D) in."""
        x = np.asarray(features, np.float64)
        mean = x.mean(0)
        self._join(len(x), mean, x - mean)

    def merge(self, other: "Moments") -> None:
        """Count in what another has counted."""
        if other.count:
            self._join(other.count, other.mean, np.empty((0, len(other.mean))))
            self._scatter = self.scatter + other.scatter

    def _join(self, count: int, mean: np.ndarray, centred: np.ndarray) -> None:
        if self._mean is None or self._scatter is None:
            self._mean, self._scatter = np.zeros_like(mean), np.zeros((len(mean), len(mean)))
        total, step = self.count + count, mean - self._mean
        rows = np.concatenate([centred, step[None] * np.sqrt(self.count * count / total)])
        self._scatter += rows.T @ rows
        self._mean = self._mean + step * (count / total)
        self.count = total

    @property
    def mean(self) -> np.ndarray:
        """Mean (D,)."""
        assert self._mean is not None  # asked for after `add`
        return self._mean

    @property
    def scatter(self) -> np.ndarray:
        """Sum of the outer products (D,D) of the centred features."""
        assert self._scatter is not None  # asked for after `add`
        return self._scatter

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased estimate (D,D); zeros for one image."""
        return self.scatter / max(1, self.count - 1)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays that restore it."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter} if self.count else {}

    @classmethod
    def of(cls, state: Arrays) -> Self:
        """Restore it."""
        return cls(int(state["count"]), state["mean"], state["scatter"]) if state else cls()


class SplitScores:
    """Sums of class probabilities for the Inception score (Salimans et al. 2016) of every `SPLIT` images in turn."""

    def __init__(self, sums: dict[int, np.ndarray] | None = None) -> None:
        self.sums = {} if sums is None else sums  # split -> (C+2,): sums of p, of sum_c p log p, of 1

    def add(self, logits: np.ndarray, first: int) -> None:
        """Count in the logits (B,C) of the images first ... first+B-1."""
        x = np.asarray(logits, np.float64)
        x = x - x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        rows = np.concatenate([p, (p * log_p).sum(1, keepdims=True), np.ones((len(x), 1))], axis=1)
        split = (first + np.arange(len(x))) // SPLIT
        for number in np.unique(split):
            self.sums[int(number)] = self.sums.get(int(number), 0) + rows[split == number].sum(0)

    def merge(self, other: "SplitScores") -> None:
        """Count in what another has counted."""
        for number, sums in other.sums.items():
            self.sums[number] = self.sums.get(number, 0) + sums

    def scores(self) -> np.ndarray:
        """exp(E[KL(p(y|x) || p(y))]) of every split."""
        return np.array([_score(self.sums[number]) for number in sorted(self.sums)])

    def state(self) -> dict[str, np.ndarray]:
        """Arrays that restore it."""
        return {str(number): sums for number, sums in self.sums.items()}

    @classmethod
    def of(cls, state: Arrays) -> Self:
        """Restore it."""
        return cls({int(number): sums for number, sums in state.items()})


def _score(sums: np.ndarray) -> float:
    p, entropy, count = sums[:-2] / sums[-1], sums[-2] / sums[-1], sums[-1]
    assert count > 0
    seen = p[p > 0]
    return float(np.exp(entropy - (seen * np.log(seen)).sum()))
