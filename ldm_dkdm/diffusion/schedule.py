"""Noise schedules, in float64."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.diffusion.timesteps import SPACINGS
from ldm_dkdm.errors import UserError, pick


def scaled_linear(num_timesteps: int, start: float, end: float) -> Tensor:
    """Betas that are linear in sqrt(beta); CompVis calls this "linear"."""
    return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64, device="cpu") ** 2


def linear(num_timesteps: int, start: float, end: float) -> Tensor:
    """Linear betas (Ho et al. 2020)."""
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64, device="cpu")


def cosine(num_timesteps: int, start: float, end: float) -> Tensor:
    """Betas of abar_t = cos^2 (Nichol & Dhariwal 2021, Eq. 17), at most 0.999; the ends are not used."""
    abar = [math.cos((i / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_timesteps + 1)]
    return torch.from_numpy(np.minimum(1 - np.divide(abar[1:], abar[:-1]), 0.999))


# name -> maker (num_timesteps, beta_start, beta_end) -> betas (T,), float64
SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
    "cosine": cosine,
}
DEFAULT, DEFAULT_T = "scaled_linear", 1000
# name -> default beta_start, beta_end, and the T at which they hold where they are divided by T (guided-diffusion)
BETA_ENDS = {
    "scaled_linear": (0.0015, 0.0195, None),  # CompVis's
    "linear": (0.0001, 0.02, 1000),  # Ho et al. 2020
    "cosine": (0.0015, 0.0195, None),  # not used
}


def beta_ends(name: str, num_timesteps: int) -> tuple[float, float]:
    """Default (beta_start, beta_end) of a schedule in SCHEDULES, at most 0.999."""
    start, end, steps = BETA_ENDS.get(name, BETA_ENDS["scaled_linear"])
    scale = steps / num_timesteps if steps else 1.0
    return min(0.999, start * scale), min(0.999, end * scale)


VARIANCES = {
    "posterior": "beta~ of the posterior (DDPM, Sec. 3.2)",
    "beta": "beta_t",
}  # fixed variances of a reverse step


class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), t = 0 ... T-1.

    Args:
        name: one of SCHEDULES.
        num_timesteps: T.
        beta_start, beta_end: ends of the two linear schedules; default: BETA_ENDS, for `linear` times 1000 / T.
            `cosine` does not use them.
        steps_offset: DDIM's lowest timestep: 1 in CompVis's code (default), 0 in guided-diffusion's. A model that is
            given a schedule without it has that of its space. The name is diffusers'.
        betas: any betas (T,), each strictly between 0 and 1, in place of a named schedule.
        variance: of a reverse step, one of VARIANCES; a network that predicts its own ignores it.
        rescale_betas_zero_snr: abar_{T-1} is set to 0 and the others are shifted (Lin et al. 2023, Alg. 1).
        timestep_spacing: of samplers with fewer steps, one of SPACINGS; None: each sampler's own.
        set_alpha_to_one: DDIM's last target is x_0 (abar_{-1} = 1), else abar_0; default: it is the timestep below the
            lowest one, so that samples end at abar_0 in CompVis's code and at x_0 in guided-diffusion's.
        usual_offset: `steps_offset` where it is not given.

    Raises:
        UserError: an unknown name, values of another type or outside these ranges, another T than the number of betas,
            or an argument without effect: a name or ends beside betas, ends of `cosine`.

    Attributes:
        betas, alphas_cumprod: float64 tensors (T,) on the CPU.
        unscaled_betas: the same as `betas` before `rescale_betas_zero_snr`.
        ends_given: `steps_offset` and `set_alpha_to_one` as they were given, None where they were not.
        ends_in_noise: abar_{T-1} is 0: x_{T-1} says nothing about x_0, and its eps is x_{T-1} itself.
    """

    def __init__(
        self,
        name: str = DEFAULT,
        num_timesteps: int = DEFAULT_T,
        beta_start: float | None = None,
        beta_end: float | None = None,
        steps_offset: int | None = None,
        *,
        betas: Tensor | Sequence[float] | None = None,
        variance: str = "posterior",
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str | None = None,
        set_alpha_to_one: bool | None = None,
        usual_offset: int = 1,
    ) -> None:
        pick(SCHEDULES, name, "schedule")
        pick(VARIANCES, variance, "variance")
        _require_numbers("a whole number", Integral, num_timesteps=num_timesteps)
        if num_timesteps < 1:
            raise UserError(f"num_timesteps: must be at least 1, got {num_timesteps}")
        if timestep_spacing is not None:
            pick(SPACINGS, timestep_spacing, "timestep_spacing")
        _require_ends(steps_offset, set_alpha_to_one)
        _require_truth(rescale_betas_zero_snr=rescale_betas_zero_snr)
        offset = None if steps_offset is None else int(steps_offset)
        to_x0 = None if set_alpha_to_one is None else bool(set_alpha_to_one)
        self.ends_given: dict[str, Any] = {"steps_offset": offset, "set_alpha_to_one": to_x0}
        self.steps_offset = usual_offset if offset is None else offset
        self.set_alpha_to_one = self.steps_offset == 0 if to_x0 is None else to_x0
        self.variance, self.timestep_spacing = variance, timestep_spacing
        self._require_effect(name, beta_start, beta_end, betas)
        first, final = beta_ends(name, num_timesteps)
        self.beta_start = first if beta_start is None else beta_start
        self.beta_end = final if beta_end is None else beta_end
        _require_numbers("a number", Real, beta_start=self.beta_start, beta_end=self.beta_end)
        self.unscaled_betas = self._named(name, num_timesteps) if betas is None else _given(betas)
        self.name = name if betas is None else "betas"
        self.num_timesteps, self.ends_in_noise = len(self.unscaled_betas), bool(rescale_betas_zero_snr)
        if num_timesteps not in (self.num_timesteps, DEFAULT_T):  # the default, as if it was not given
            raise UserError(f"num_timesteps: {num_timesteps} is not the number of betas, which is {self.num_timesteps}")
        self.alphas_cumprod = torch.cumprod(1 - self.unscaled_betas, 0)
        _require_noise(self.alphas_cumprod, "beta_start, beta_end" if betas is None else "betas")
        self.betas = self.unscaled_betas
        if rescale_betas_zero_snr:
            self.alphas_cumprod = zero_terminal_snr(self.alphas_cumprod)
            self.betas = betas_of(self.alphas_cumprod)
        self._tables: dict[torch.device, Tensor] = {}

    @staticmethod
    def _require_effect(name: str, beta_start: object, beta_end: object, betas: object) -> None:
        """Refuse what is not used beside something else; the default name counts as not given."""
        given = {"name": name if name != DEFAULT else None, "beta_start": beta_start, "beta_end": beta_end}
        found = [key for key, value in given.items() if value is not None]
        if betas is not None and found:
            raise UserError(f"{found[0]}: has no effect beside betas; leave it out")
        if betas is None and name == "cosine" and found[1:]:
            raise UserError(f"{found[1]}: has no effect with the cosine schedule; leave it out")

    def _named(self, name: str, num_timesteps: int) -> Tensor:
        start, end = self.beta_start, self.beta_end
        if SCHEDULES[name] is not cosine and not 0 < start <= end < 1:
            raise UserError(f"beta_start, beta_end: must satisfy 0 < beta_start <= beta_end < 1, got {start}, {end}")
        return SCHEDULES[name](num_timesteps, start, end)

    def alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """abar_t for timesteps t (B,) in [-1, T-1], abar_{-1} = 1, shaped to broadcast with `like`.

        On its device, float64 (float32 where the device has no float64).
        """
        values = self._table(like.device)[t.to(like.device).long() + 1]
        return values.view(-1, *[1] * (like.ndim - 1))

    def timesteps_at(self, quantiles: Tensor, cap: float | None = None) -> Tensor:
        """The t (B,) at quantiles (B,) in [0,1) of the density min(1, cap * abar_t), at least 0.1, on [0, T-1].

        Fewer t are near pure noise, where x_t says little about the image (min-SNR, Hang et al. 2023, weights the
        loss to that end). Without a cap the density is uniform.
        """
        density = self.density(cap)
        cdf = (density.cumsum(0) / density.sum()).to(quantiles)
        return torch.searchsorted(cdf, quantiles, right=True).clamp(max=self.num_timesteps - 1)

    def density(self, cap: float | None = None) -> Tensor:
        """The density (T,) of `timesteps_at`, at most 1, float64."""
        if cap is None:
            return torch.ones_like(self.alphas_cumprod)
        return (self.alphas_cumprod * cap).clamp(0.1, 1)

    def _table(self, device: torch.device) -> Tensor:
        """abar_{-1} ... abar_{T-1} on a device, copied there once."""
        if device not in self._tables:
            with torch.inference_mode(False):  # a later training needs it too
                table = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod])
                self._tables[device] = table.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self._tables[device]


def _require_numbers(what: str, kind: type, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name}: expected {what}, got {value!r}")


def _require_ends(steps_offset: object, set_alpha_to_one: object) -> None:
    if steps_offset is not None:
        _require_numbers("a whole number", Integral, steps_offset=steps_offset)
    if steps_offset not in (None, 0, 1):
        raise UserError(f"steps_offset: must be 0 or 1, got {steps_offset}")
    if set_alpha_to_one is not None:
        _require_truth(set_alpha_to_one=set_alpha_to_one)


def _require_truth(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise UserError(f"{name}: expected true or false, got {value!r}")


def _require_noise(alphas_cumprod: Tensor, names: str) -> None:
    """Refuse betas so small that float64 sees no noise, or so large that it sees no image."""
    first, last = alphas_cumprod[0].item(), alphas_cumprod[-1].item()
    if not 0 < last <= first < 1:
        raise UserError(f"{names}: alphas_cumprod goes from {first:g} to {last:g}; it must stay above 0 and below 1")


def _given(betas: Tensor | Sequence[float]) -> Tensor:
    try:
        values = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"betas: expected a row of numbers, got {betas!r}") from error
    if values.ndim != 1 or not len(values) or not bool(((values > 0) & (values < 1)).all()):
        raise UserError(f"betas: {tuple(values.shape)} values must be one row, each strictly between 0 and 1")
    return values


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alphas_cumprod (T,) whose square root is shifted to end at 0 and scaled to begin as before (Lin et al., Alg. 1).

    Raises:
        UserError: a single timestep, which cannot be both.
    """
    root = alphas_cumprod.sqrt()
    if len(root) == 1:
        raise UserError("rescale_betas_zero_snr: needs at least 2 timesteps")
    abar: Tensor = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return abar


def betas_of(alphas_cumprod: Tensor) -> Tensor:
    """The betas (T,) whose cumulative product of 1 - beta is alphas_cumprod (T,), float64."""
    abar = alphas_cumprod.double()
    return 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), abar[:-1]])
