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
PROBES = (4, 12)  # images of the two calls that are measured
FRACTION = 0.8  # largest part of the free memory that a batch takes


class Memory:
    """Free and peak memory of a CUDA device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak(self, work: Callable[[], object]) -> int:
        """The most that a call allocates."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> int:
        """Bytes free on the device, with those that PyTorch holds unused."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held


def memory_of(device: torch.device) -> Memory | None:
    """A device's memory; None where PyTorch does not report it."""
    return Memory(device) if device.type == "cuda" else None


def filled(model: "DiffusionModel", config: SamplingConfig, ranks: Ranks = ALONE) -> SamplingConfig:
    """The config with batches that fill the model's device, at most a rank's share of the images.

    All ranks use the smallest of their batches, since together they make the images of one process. Where PyTorch does
    not report a device's memory, the batch is the config's, or the share if that is smaller.
    """
    memory = memory_of(model.device)
    size = config.batch_size if memory is None else _fitting(model, memory)
    return replace(config, batch_size=min(*ranks.gather(size), -(-config.count // ranks.ranks)))


def _fitting(model: "DiffusionModel", memory: Memory) -> int:
    """Images whose prediction fits and whose decoding does; each has a peak of its own, so each is measured."""
    try:
        sizes = []
        for work in (_predict, _decode):
            work(model, 1)  # loads what is loaded once
            few, more = (memory.peak(partial(work, model, images)) for images in PROBES)
            sizes.append(fitting(few, more, memory.free()))
        return min(sizes)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return 1


def fitting(few: int, more: int, free: int) -> int:
    """The largest power of two, 1 to MOST, of images that fit, if `few` and `more` are the bytes of PROBES.

    >>> fitting(few=4 << 20, more=12 << 20, free=400 << 20)
    256
    """
    each = max(0.0, (more - few) / (PROBES[1] - PROBES[0]))
    room = FRACTION * free - (more - PROBES[1] * each)
    if room < each or room <= 0:
        return 1
    images = MOST if room >= MOST * each else int(room / each)
    return 1 << images.bit_length() - 1


def _predict(model: "DiffusionModel", count: int) -> None:
    """One prediction of `count` images."""
    x = torch.zeros(count, *model.shape, dtype=torch.float32, device=model.device)
    t = torch.zeros(count, dtype=torch.long, device=model.device)
    label = None if model.classes is None else torch.full_like(t, model.classes[0])
    model.predict(x, t, label)


def _decode(model: "DiffusionModel", count: int) -> None:
    """One decoding of `count` images."""
    codec = model.codec().to(model.device, resolve_precision(model.precision, model.device))
    codec.decode(torch.zeros(count, *model.shape, dtype=torch.float32, device=model.device))
