"""The batch that fills a device's memory, from what a few images take."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.model.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from ldm_dkdm.model.diffusion_model import DiffusionModel

MOST = 1024
PROBES = (4, 12)  # images, after a call that loads what the first one loads
SHARE = 0.8  # of the memory that is left may be filled


class Memory:
    """What a CUDA device tells of its memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak(self, work: Callable[[], object]) -> int:
        """What a piece of work takes at most."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> int:
        """What is left: of the device, and of what PyTorch has kept of it."""
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept


def memory_of(device: torch.device) -> Memory | None:
    """The memory of a device that tells it."""
    return Memory(device) if device.type == "cuda" else None


def filled(model: "DiffusionModel", config: SamplingConfig, ranks: Ranks = ALONE) -> SamplingConfig:
    """The config with batches that fill the model's device, at most a rank's share of the images.

    Where a device does not tell its memory, the config's batch stays. One prediction and one decoding of a few images
    are measured, and what each further image takes. Of several ranks the smallest batch is that of all, since together
    they make the images of one process.
    """
    memory, size = memory_of(model.device), config.batch_size
    if memory is not None:
        _try(model, PROBES[0])
        few, more = (memory.peak(partial(_try, model, images)) for images in PROBES)
        size = fitting(few, more, memory.free())
    return replace(config, batch_size=min(*ranks.gather(size), -(-config.count // ranks.ranks)))


def fitting(few: int, more: int, free: int) -> int:
    """The largest power of two of images, 1 to MOST, whose bytes are free; `few` and `more` are those of PROBES.

    >>> fitting(few=4 << 20, more=12 << 20, free=400 << 20)
    256
    """
    each = max(1.0, (more - few) / (PROBES[1] - PROBES[0]))
    fixed = max(0.0, few - PROBES[0] * each)
    images = int((SHARE * free - fixed) / each)
    return min(MOST, 1 << max(images, 1).bit_length() - 1)


def _try(model: "DiffusionModel", count: int) -> None:
    """One prediction and one decoding of so many images."""
    x = torch.zeros(count, *model.shape, device=model.device)
    t = torch.zeros(count, dtype=torch.long, device=model.device)
    label = None if model.classes is None else torch.full_like(t, model.classes[0])
    codec = model.codec().to(model.device, resolve_precision(model.precision, model.device))
    codec.decode(model.predict(x, t, label).x_0)
