"""What the hosts of all ranks decide together after a step: no device is waited for."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from torch import distributed

_groups: WeakKeyDictionary[L.Trainer, Any] = WeakKeyDictionary()
_waits: WeakKeyDictionary[L.Trainer, timedelta] = WeakKeyDictionary()


def wait_for_hosts(trainer: L.Trainer, timeout: timedelta) -> None:
    """Give the hosts of a trainer a limit for their waits for each other, that of its devices."""
    _waits[trainer] = timeout


def any_host(trainer: L.Trainer, flag: bool) -> bool:
    """Whether a flag is set on any rank; all ranks must ask."""
    return any(value > 0 for value in mean_of_hosts(trainer, [float(flag)]))


def mean_of_hosts(trainer: L.Trainer, values: Sequence[float]) -> list[float]:
    """Means of numbers over all ranks, the same on each; all ranks must ask, for equally many."""
    if trainer.world_size == 1 or not values:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    distributed.all_reduce(numbers, group=_group(trainer))
    return (numbers / trainer.world_size).tolist()


def _group(trainer: L.Trainer) -> Any:
    """The hosts' connections: torch.distributed's own where it is on the host, else others, made once."""
    if distributed.get_backend() == "gloo":
        return None
    if trainer not in _groups:
        _groups[trainer] = distributed.new_group(timeout=_waits.get(trainer), backend="gloo")
    return _groups[trainer]
