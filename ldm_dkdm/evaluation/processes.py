"""Gather statistics in several processes, each on a device of its own: contiguous parts, joined in order."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.features import open_extractor
from ldm_dkdm.evaluation.partial import SAVE_SECONDS, partial_file, stream
from ldm_dkdm.evaluation.samples import ModelImages
from ldm_dkdm.evaluation.sources import ImageSource
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.reporting import Progress, following


@dataclass(frozen=True)
class Part:
    """The images first ... last-1 of a set."""

    whole: ImageSource
    first: int
    last: int
    of: Mapping[str, Any] | None = None  # identity of the whole that another process has found

    @property
    def name(self) -> str:
        """The set and the numbers."""
        return f"{self.whole.name}[{self.first}:{self.last}]"

    @property
    def count(self) -> int:
        """Number of images."""
        return self.last - self.first

    def identity(self) -> dict[str, Any]:
        """The set's, and the numbers."""
        return {**(self.of or self.whole.identity()), "part": [self.first, self.last]}

    def facts(self) -> dict[str, Any]:
        """The set's."""
        return self.whole.facts()

    def stored(self) -> Statistics | None:
        """None: statistics are those of whole sets."""
        return None

    def batches(self, first: int, batch_size: int) -> Iterator[Tensor]:
        """Images from number `first` of the part on."""
        left = self.count - first
        for images in self.whole.batches(self.first + first, batch_size) if left > 0 else ():
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return


@dataclass(frozen=True)
class _Job:
    part: Part
    extractors: Mapping[str, tuple[str | Path | Extractor, bool]]  # name -> its opener, and whether features are kept
    device: str
    threads: int
    cache: Path | None
    batch_size: int
    save_seconds: float

    def collectors(self) -> dict[str, Collector]:
        """New collectors on this job's device."""
        return {name: Collector(self._opened(own), keep) for name, (own, keep) in self.extractors.items()}

    def _opened(self, opener: str | Path | Extractor) -> Extractor:
        return opener if isinstance(opener, Extractor) else open_extractor(opener, self.device)


def gather_in_processes(
    source: ImageSource,
    collectors: Mapping[str, Collector],
    processes: int,
    cache: Path | None,
    batch_size: int,
    progress: bool | Progress = False,
    save_seconds: float = SAVE_SECONDS,
) -> None:
    """Add all images to all collectors; every process resumes its part.

    Models that are on a GPU are copied to the GPUs 0, 1, ... in turn; on a CPU the processes share its cores.
    """
    jobs = _jobs(source, collectors, processes, cache, batch_size, save_seconds)
    with (
        ProcessPoolExecutor(len(jobs), mp_context=get_context("spawn")) as pool,
        following(progress, f"features of {source.name}, {len(jobs)} processes", "image", source.count) as show,
    ):
        for job, states in zip(jobs, pool.map(_run, jobs), strict=True):
            for name, collector in collectors.items():
                part = Collector(collector.extractor, collector.keep)
                part.restore(states[name])
                collector.merge(part)
            show(job.part.last)
    if cache is not None:
        for job in jobs:
            partial_file(cache, job.part, collectors).unlink(missing_ok=True)


def _jobs(
    source: ImageSource,
    collectors: Mapping[str, Collector],
    processes: int,
    cache: Path | None,
    batch_size: int,
    save_seconds: float,
) -> list[_Job]:
    own = next(iter(collectors.values())).extractor.device
    gpus = torch.cuda.device_count() if own.type == "cuda" else 0
    threads = max(1, (os.cpu_count() or 1) // processes)
    opened = {name: (c.extractor.opener, c.keep) for name, c in collectors.items()}
    ends = np.linspace(0, source.count, min(processes, source.count) + 1).astype(int).tolist()
    return [
        _Job(
            Part(source, first, last, source.identity()),
            opened,
            f"cuda:{number % gpus}" if gpus else str(own),
            threads,
            cache,
            batch_size,
            save_seconds,
        )
        for number, (first, last) in enumerate(pairwise(ends))
    ]


def _run(job: _Job) -> dict[str, dict[str, np.ndarray]]:
    """The work of one process: the state of every collector after its part."""
    torch.set_num_threads(job.threads)
    part, collectors = job.part, job.collectors()
    if isinstance(part.whole, ModelImages):
        part = replace(part, whole=replace(part.whole, model=part.whole.model.to(job.device)))
    stream(part, collectors, job.cache, job.batch_size, False, job.save_seconds, part.first)
    return {name: collector.state() for name, collector in collectors.items()}
