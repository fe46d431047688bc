"""Every random choice follows from (seed, rank, step, purpose): an exact resume stores no generator state."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

PURPOSES = ("draw", "step_noise", "label", "warmup", "data", "network", "deal", "refill", "evaluation", "replay")


def key(seed: int, rank: int, step: int, purpose: str) -> np.random.SeedSequence:
    """The seed sequence of one choice."""
    return np.random.SeedSequence((seed, rank, step, PURPOSES.index(purpose)))


def numpy_generator(seed: int, rank: int, step: int, purpose: str) -> np.random.Generator:
    """A NumPy generator for choices on the host."""
    return np.random.default_rng(key(seed, rank, step, purpose))


def seed_of(seed: int, rank: int, step: int, purpose: str) -> int:
    """A 63-bit seed for torch."""
    return int(key(seed, rank, step, purpose).generate_state(1, np.uint64)[0] >> 1)


def torch_generator(
    seed: int, rank: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator on the device where its numbers are wanted."""
    return torch.Generator(device).manual_seed(seed_of(seed, rank, step, purpose))


@contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block, and let it make tensors on the CPU; both end with it."""
    with torch.device("cpu"), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
