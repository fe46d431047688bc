"""Agreement of a student with its teacher, measured without data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.diffusion.samplers import Denoise
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.teacher import Teacher


@dataclass(frozen=True)
class HeldOutStates:
    """States of exact ancestral chains of the teacher and what it predicts there."""

    x: Tensor  # (N,C,H,W)
    t: Tensor  # (N,)
    eps: Tensor  # (N,C,H,W)


def held_out_chains(
    teacher: Teacher, shape: tuple[int, int, int], chains: int, seed: int, device: torch.device | str, every: int = 25
) -> HeldOutStates:
    """Walk `chains` fresh ancestral chains through all T steps and keep every `every`-th state."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((chains, *shape), generator=generator, device=device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in reversed(range(teacher.schedule.num_timesteps)):
        t = torch.full((chains,), step, device=device)
        noise = torch.randn(x.shape, generator=generator, device=device)
        prediction, x_next = teacher.step(NoisyBatch(x, t), noise)
        if step % every == every // 2:
            kept.append((x, t, prediction.eps))
        x = x_next
    return HeldOutStates(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


@torch.no_grad()
def eps_error_by_quarter(
    denoise: Denoise, states: HeldOutStates, num_timesteps: int, batch_size: int = 128
) -> list[float]:
    """Mean squared eps error against the teacher for t in the four quarters of [0, T), ascending."""
    errors = [
        (denoise(x, t, None).eps.float() - eps).square().flatten(1).mean(1)
        for x, t, eps in zip(
            states.x.split(batch_size), states.t.split(batch_size), states.eps.split(batch_size), strict=True
        )
    ]
    error = torch.cat(errors)
    quarter = (states.t * 4) // num_timesteps
    return [error[quarter == q].mean().item() for q in range(4)]
