"""Fill pools with the states of a reference cache."""

import torch

from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.errors import UserError
from ldm_dkdm.records import NoisyBatch
from ldm_dkdm.rng import numpy_generator, torch_generator

CHUNK = 4096  # slots copied at once


def check_supply(states: NoisyBatch, slots: int, ranks: int, batch_size: int, num_timesteps: int) -> None:
    """Refuse a cache that is smaller than the pools of all ranks together."""
    if len(states.t) < slots * ranks:
        rho = len(states.t) // (ranks * batch_size) / num_timesteps
        raise UserError(
            f"pool_from: holds {len(states.t)} slots, this configuration needs {slots} x {ranks} "
            f"(devices); set rho={rho:g} or less"
        )


def refill(pool: NoisyPool, states: NoisyBatch, num_timesteps: int, seed: int, rank: int) -> None:
    """Fill a rank's pool with its share of states (N,C,H,W), which are shuffled before they are dealt.

    Finished slots (timestep -1, without labels) begin again with noise at T. Every split of the same cache over ranks
    deals each state at most once.
    """
    order = torch.from_numpy(numpy_generator(seed, 0, 0, "deal").permutation(len(states.t)))
    generator = torch_generator(seed, rank, 0, "refill")
    for share in order[rank * len(pool) : (rank + 1) * len(pool)].split(CHUNK):
        x, t = states.x[share], states.t[share]
        finished = t < 0
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device=generator.device)
        pool.fill(
            NoisyBatch(
                torch.where(finished.view(-1, 1, 1, 1), noise, x),
                torch.where(finished, num_timesteps - 1, t),
                None if states.label is None else states.label[share],
            )
        )
