"""Noise schedules that diffusers has by name and this package by their betas."""

import math
from collections.abc import Callable

LARGEST = 0.999  # beta


def _sigmoid(steps: int, start: float, end: float) -> list[float]:
    """Betas of GeoDiff, which rise from `start` to `end` as a sigmoid on [-6, 6]."""
    places = [-6 + 12 * i / max(steps - 1, 1) for i in range(steps)]
    return [start + (end - start) / (1 + math.exp(-place)) for place in places]


def _of(abar: Callable[[float], float]) -> Callable[[int, float, float], list[float]]:
    """Betas of a function abar on [0, 1]; the ends are not used."""

    def betas(steps: int, start: float, end: float) -> list[float]:
        values = [abar(i / steps) for i in range(steps + 1)]
        return [min(1 - values[i + 1] / values[i], LARGEST) for i in range(steps)]

    return betas


def _laplace(t: float) -> float:
    ratio = math.exp(-math.copysign(0.5, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(ratio / (1 + ratio))


# `beta_schedule` -> (num_train_timesteps, beta_start, beta_end) -> betas
GIVEN: dict[str, Callable[[int, float, float], list[float]]] = {
    "sigmoid": _sigmoid,
    "laplace": _of(_laplace),
    "exp": _of(lambda t: math.exp(-12 * t)),
}
