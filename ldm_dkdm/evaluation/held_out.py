"""The eps error of a student on states of its teacher's chains."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.diffusion.samplers import Denoise
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import NoisyBatch


@dataclass(frozen=True)
class HeldOutStates:
    """States of exact ancestral chains of the teacher, and its predictions there."""

    x: Tensor  # (N,C,H,W)
    t: Tensor  # (N,)
    eps: Tensor  # (N,C,H,W)
    label: Tensor | None = None  # (N,)

    def is_finite(self) -> Tensor:
        """Whether a state and the teacher's eps there are finite, bool (N,)."""
        return (self.x.isfinite() & self.eps.isfinite()).flatten(1).all(1)


def held_out_chains(
    teacher: DiffusionModel,
    chains: int,
    seed: int,
    device: torch.device | str = "cpu",
    kept: int = 20,
    done: Callable[[int], object] = lambda calls: None,
) -> HeldOutStates:
    """Walk `chains` fresh ancestral chains through all T steps and keep the states at `kept_timesteps`.

    `done` is called with the number of the teacher's calls after each.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((chains, *teacher.shape), generator=generator, dtype=torch.float32, device=device)
    label = teacher.draw_labels(chains, generator)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    wanted = set(kept_timesteps(teacher.schedule.num_timesteps, kept))
    for step in reversed(range(teacher.schedule.num_timesteps)):
        t = torch.full((chains,), step, device=device)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=device)
        prediction, x_next = teacher.step(NoisyBatch(x, t, label), noise)
        if step in wanted:
            found.append((x, t, prediction.eps))
        x = x_next
        done(teacher.schedule.num_timesteps - step)
    labels = None if label is None else label.repeat(len(found))
    x, t, eps = (torch.cat(parts) for parts in zip(*found, strict=True))
    return HeldOutStates(x, t, eps, labels)


def kept_timesteps(num_timesteps: int, kept: int) -> list[int]:
    """The middles of `kept` equal parts of [0, T), ascending; all T timesteps where there are fewer."""
    count = min(kept, num_timesteps)
    return [(2 * k + 1) * num_timesteps // (2 * count) for k in range(count)]


@torch.no_grad()
def eps_errors(
    denoise: Denoise, states: HeldOutStates, batch_size: int = 128, done: Callable[[int], object] = lambda states: None
) -> Tensor:
    """Squared eps error (N,) against the teacher, mean over elements, of every state."""
    errors: list[Tensor] = []
    for part in torch.arange(len(states.t), device=states.t.device).split(batch_size):
        label = None if states.label is None else states.label[part]
        eps = denoise(states.x[part], states.t[part], label).eps.float()
        errors.append((eps - states.eps[part]).square().flatten(1).mean(1))
        done(int(part[-1]) + 1)
    return torch.cat(errors)


def eps_error_by_t(error: Tensor, states: HeldOutStates) -> dict[int, float]:
    """Mean of the errors (N,) of `eps_errors` at every timestep that the states cover."""
    return {int(t): error[states.t == t].mean().item() for t in states.t.unique()}


def eps_error_by_quarter(error: Tensor, states: HeldOutStates, num_timesteps: int) -> list[float]:
    """Mean of the errors (N,) of `eps_errors` for t in the four quarters of [0, T), ascending; NaN without states."""
    quarter = (states.t * 4) // num_timesteps
    return [error[quarter == q].mean().item() for q in range(4)]
