"""Read pool caches of the reference implementation."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.arrays import PickledArray
from ldm_dkdm.checkpoints.reading import as_tensor, read_content
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.records import NoisyBatch

STEPS, STATES = "total_t", "total_x_t_1"
IN_CHECKPOINT = "dynamic_batch"  # key of the cache in the reference's latent checkpoints


def read_reference_pool(path: Path, shape: tuple[int, int, int], num_timesteps: int) -> NoisyBatch:
    """States (N,C,H,W) and timesteps (N,) of a cache; -1 marks a finished slot.

    The reference counts the steps that remain, T for noise and 0 for finished; the timestep that the teacher
    sees next is one less.

    Raises:
        UserError: another kind of file, states of another shape, or steps above T.
    """
    with blaming(path):
        return _read(path, shape, num_timesteps)


def _read(path: Path, shape: tuple[int, int, int], num_timesteps: int) -> NoisyBatch:
    content = read_content(path)
    cache = content.get(IN_CHECKPOINT, content) if isinstance(content, Mapping) else content
    if not (isinstance(cache, Mapping) and STEPS in cache and STATES in cache):
        raise UserError(f"{path}: holds no pool of the reference implementation ({STEPS} and {STATES})")
    steps, states = _tensor(cache[STEPS], STEPS, path), _tensor(cache[STATES], STATES, path)
    if steps.ndim != 1 or steps.is_floating_point():
        raise UserError(f"{path}: {STEPS} is {steps.dtype} {tuple(steps.shape)}, expected one integer per state")
    if states.shape != (len(steps), *shape):
        raise UserError(
            f"{path}: states {tuple(states.shape)} with steps {tuple(steps.shape)}; the teacher's are {shape}"
        )
    if len(steps) == 0 or steps.min() < 0 or steps.max() > num_timesteps:
        raise UserError(f"{path}: its steps are outside 0 ... {num_timesteps}, the teacher's range")
    if not torch.isfinite(states.half()).all():
        raise UserError(f"{path}: holds states that are not finite, in half precision; the file is damaged")
    return NoisyBatch(states.float(), steps.long() - 1, None)


def _tensor(value: object, name: str, path: Path) -> Tensor:
    if isinstance(value, (Tensor, PickledArray)):
        numbers = as_tensor(value, name, path)
        if not (numbers.is_complex() or numbers.dtype == torch.bool):
            return numbers
    raise UserError(f"{path}: {name} is not an array of numbers")
