"""Noise schedules, in float64."""

import math

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.errors import UserError


class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 0 ... T-1.

    Args:
        name: `scaled_linear` (linear in sqrt(beta); CompVis calls it "linear"), `linear`
            (Ho et al. 2020) or `cosine` (Nichol & Dhariwal 2021, Eq. 17).
        num_timesteps: T.
        beta_start, beta_end: ends of the two linear schedules; `cosine` does not use them.
        steps_offset: DDIM's lowest timestep, and its last target is the one below it: 1 in CompVis's code (samples
            end at abar_0), 0 in guided-diffusion's (they end at x_0, abar_{-1} = 1). The name is diffusers'.

    Attributes:
        betas, alphas_cumprod: float64 tensors (T,) on the CPU.
    """

    def __init__(
        self,
        name: str = "scaled_linear",
        num_timesteps: int = 1000,
        beta_start: float = 0.0015,
        beta_end: float = 0.0195,
        steps_offset: int = 1,
    ) -> None:
        if num_timesteps < 1:
            raise UserError(f"diffusion.num_timesteps: {num_timesteps} is not at least 1")
        if name != "cosine" and not 0 < beta_start <= beta_end < 1:
            raise UserError(f"diffusion: 0 < beta_start <= beta_end < 1 is not so for {beta_start}, {beta_end}")
        self.name, self.steps_offset = name, steps_offset
        self.num_timesteps = num_timesteps
        self.betas = _betas(name, num_timesteps, beta_start, beta_end)
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self._tables: dict[torch.device, Tensor] = {}

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """abar_t for timesteps t (B,) in [-1, T-1], abar_{-1} = 1, shaped to broadcast with `like`.

        On its device, float64 (float32 where the device has no float64).
        """
        values = self._table(like.device)[t.to(like.device).long() + 1]
        return values.view(-1, *[1] * (like.ndim - 1))

    def timesteps_at(self, quantiles: Tensor, cap: float | None = None) -> Tensor:
        """The t (B,) at quantiles (B,) in [0,1) of the density min(1, cap * abar_t), at least 0.1, on [0, T-1].

        It spends less on states so near pure noise that no picture is decided there (as min-SNR weights
        do, Hang et al. 2023, by sampling instead of weighting). Without a cap it is uniform.
        """
        density = (self.alphas_cumprod * (cap or float("inf"))).clamp(0.1, 1)
        cdf = (density.cumsum(0) / density.sum()).to(quantiles)
        return torch.searchsorted(cdf, quantiles, right=True).clamp(max=self.num_timesteps - 1)

    def _table(self, device: torch.device) -> Tensor:
        """abar_{-1} ... abar_{T-1} on a device, copied there once."""
        if device not in self._tables:
            table = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])
            self._tables[device] = table.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self._tables[device]


def _betas(name: str, num_timesteps: int, start: float, end: float) -> Tensor:
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64) ** 2
    if name == "linear":
        return torch.linspace(start, end, num_timesteps, dtype=torch.float64)
    if name == "cosine":
        abar = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
        return torch.from_numpy(np.minimum(1 - np.divide(abar[1:], abar[:-1]), 0.999))
    raise UserError(f"diffusion.schedule: '{name}' is not one of scaled_linear, linear, cosine")
