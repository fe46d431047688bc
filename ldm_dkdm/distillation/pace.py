"""How slots move through t: at any stride, the pool keeps its law of t."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.config.schema import DistillConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Pace:
    """Moves of the slots that preserve a density of t exactly.

    A slot at t stands at a random place inside the mass of t, moves down by a constant mass, and is at the t of the
    place where it arrives. Below the lowest t its chain ends; the next one begins at a random place of the first
    stride. A shift of the uniform law of places that wraps around keeps it, and so the density of t. Since no density
    is above 1, every move advances by at least one timestep, and by `stride` where the density is 1.

    Attributes:
        density: wanted density (T,) of t, float64, at most 1.
        stride: mass of a move.
    """

    density: Tensor
    stride: int

    def next(self, t: Tensor, place: Tensor) -> Tensor:
        """Timesteps (B,) after a move from t (B,), given uniform places in [0,1) (B,), float64; -1: the chain ended."""
        below = self.density.cumsum(0)  # mass of all t up to this one
        mass = below[t] - (1 - place) * self.density[t] - self.stride
        moved = torch.searchsorted(below, mass, right=True).minimum(t - 1)  # where rounding reaches t itself
        return moved.where(mass >= 0, -1)

    def first(self, place: Tensor) -> Tensor:
        """Timesteps (B,) at which chains begin, given uniform places in [0,1) (B,), float64."""
        below = self.density.cumsum(0)
        mass = below[-1] - (1 - place) * below[-1].clamp(max=self.stride)
        return torch.searchsorted(below, mass, right=True).clamp(max=len(below) - 1)


def pace_of(config: DistillConfig, schedule: NoiseSchedule) -> Pace | None:
    """The moves of a configuration; None: one timestep each, from T on, as in the paper."""
    cap = config.warmup.t_cap
    if config.stride == 1 and cap is None:
        return None
    return Pace(schedule.density(cap), config.stride)
