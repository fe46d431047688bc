"""Gather statistics over the ranks of torchrun or srun: contiguous parts of whole batches, joined in order."""

from collections.abc import Mapping
from pathlib import Path

from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.partial import partial_file, stream
from ldm_dkdm.evaluation.processes import Part
from ldm_dkdm.evaluation.sources import ImageSource
from ldm_dkdm.model.ranks import Ranks
from ldm_dkdm.reporting import Progress


def part_of(source: ImageSource, ranks: Ranks, batch_size: int) -> Part:
    """A rank's images: the batches are those of one process, so that the images are bitwise the same."""
    batches = -(-source.count // batch_size)
    first, last = (batches * rank // ranks.ranks * batch_size for rank in (ranks.rank, ranks.rank + 1))
    return Part(source, first, min(last, source.count), ranks.from_first(source.identity()))


def gather_over_ranks(
    source: ImageSource,
    collectors: Mapping[str, Collector],
    ranks: Ranks,
    cache: Path | None,
    batch_size: int,
    progress: bool | Progress,
    save_seconds: float,
) -> None:
    """Add all images to all collectors of every rank; each rank reads its part, and resumes it from the cache."""
    part = part_of(source, ranks, batch_size)
    own = {name: Collector(collector.extractor, collector.keep) for name, collector in collectors.items()}
    if part.count:
        stream(part, own, cache, batch_size, progress if ranks.first else False, save_seconds, part.first)
    for states in ranks.gather({name: collector.state() for name, collector in own.items()}):
        for name, collector in collectors.items():
            added = Collector(collector.extractor, collector.keep)
            added.restore(states[name])
            collector.merge(added)
    if cache is not None:
        partial_file(cache, part, own).unlink(missing_ok=True)
