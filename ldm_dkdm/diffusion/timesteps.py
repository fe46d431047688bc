"""Which timesteps a sampler visits; all lists ascend."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ldm_dkdm.errors import UserError

if TYPE_CHECKING:
    from ldm_dkdm.diffusion.schedule import NoiseSchedule


def ddim_timesteps(num_timesteps: int, steps: int, offset: int = 1) -> list[int]:
    """Ascending DDIM timesteps: range(0, T, T // steps) + offset, kept below T; CompVis's offset is 1.

    As there, a `steps` that does not divide T gives a few more timesteps. At steps = T nothing is added.
    """
    _check_steps(num_timesteps, steps)
    stride = num_timesteps // steps
    return [min(t + offset * (stride > 1), num_timesteps - 1) for t in range(0, num_timesteps, stride)]


def respaced_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` ascending timesteps spread evenly from 0 to T-1, both included (Improved DDPM, Sec. 4).

    At some unusual numbers of steps the authors' code rounds a few timesteps the other way. One step is T-1.
    """
    _check_steps(num_timesteps, steps)
    if steps == 1:
        return [num_timesteps - 1]
    return _even(num_timesteps, steps)


def leading_timesteps(num_timesteps: int, steps: int, offset: int = 0) -> list[int]:
    """`steps` ascending timesteps, T // steps apart, from `offset`, kept below T; at steps = T all."""
    _check_steps(num_timesteps, steps)
    first, stride = offset * (steps < num_timesteps), num_timesteps // steps
    return [min(i * stride + first, num_timesteps - 1) for i in range(steps)]


def trailing_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` ascending timesteps that count down from T-1 in equal parts of T (Lin et al. 2023, Sec. 3.3)."""
    _check_steps(num_timesteps, steps)
    return [round(num_timesteps - i * (num_timesteps / steps)) - 1 for i in reversed(range(steps))]


def solver_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` ascending timesteps spread evenly over (0, T-1], diffusers' `linspace` spacing; all at steps = T."""
    _check_steps(num_timesteps, steps)
    if steps == num_timesteps:
        return list(range(num_timesteps))
    return _even(num_timesteps, steps + 1)[1:]


def _even(num_timesteps: int, count: int) -> list[int]:
    """`count` integers from 0 to T-1, rounded as NumPy does."""
    return [int(t) for t in np.linspace(0, num_timesteps - 1, count).round()]


# value of `timestep_spacing` -> (T, steps, steps_offset) -> timesteps, as in diffusers' DDIM and DDPM
SPACINGS: dict[str, Callable[[int, int, int], list[int]]] = {
    "leading": leading_timesteps,
    "trailing": lambda num_timesteps, steps, offset: trailing_timesteps(num_timesteps, steps),
    "linspace": lambda num_timesteps, steps, offset: respaced_timesteps(num_timesteps, steps),
}


def of_ddim(schedule: "NoiseSchedule", steps: int) -> list[int]:
    """DDIM's timesteps: in the schedule's spacing, else CompVis's."""
    if schedule.timestep_spacing is None:
        return ddim_timesteps(schedule.num_timesteps, steps, schedule.steps_offset)
    return SPACINGS[schedule.timestep_spacing](schedule.num_timesteps, steps, schedule.steps_offset)


def of_ddpm(schedule: "NoiseSchedule", steps: int) -> list[int]:
    """Ancestral sampling's timesteps: in the schedule's spacing, else Improved DDPM's."""
    if schedule.timestep_spacing is None:
        return respaced_timesteps(schedule.num_timesteps, steps)
    return SPACINGS[schedule.timestep_spacing](schedule.num_timesteps, steps, schedule.steps_offset)


def of_solver(schedule: "NoiseSchedule", steps: int) -> list[int]:
    """DPM-Solver++'s timesteps: trailing where the schedule says so, else evenly spread from T-1.

    `leading`, which diffusers writes into every DDIM scheduler, would begin far below T-1 with few steps.
    """
    if schedule.timestep_spacing == "trailing":
        return trailing_timesteps(schedule.num_timesteps, steps)
    return solver_timesteps(schedule.num_timesteps, steps)


def log_snr_timesteps(schedule: "NoiseSchedule", steps: int) -> list[int]:
    """At most `steps` ascending timesteps, from 0 to T-1, spread evenly over the log signal-to-noise ratio.

    The spacing of DPM-Solver (Lu et al. 2022, Sec. 3.1): few steps then keep the variance of the samples, which evenly
    spaced timesteps lose near t = 0. A terminal ratio of zero counts as the one before it.
    """
    _check_steps(schedule.num_timesteps, steps)
    abar = schedule.alphas_cumprod
    log_snr = (abar / (1 - abar)).log()
    lowest = log_snr[log_snr.isfinite()].min().item()
    wanted = torch.linspace(lowest, log_snr[0].item(), steps, dtype=torch.float64, device="cpu")
    first = {schedule.num_timesteps - 1} if schedule.ends_in_noise else set()
    return sorted({int((log_snr - value).abs().argmin()) for value in wanted[len(first) :]} | first)


def _check_steps(num_timesteps: int, steps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps: {steps} is not between 1 and the {num_timesteps} diffusion steps")
