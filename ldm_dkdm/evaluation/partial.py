"""Stream images through collectors, with partial sums saved now and then, from which an interrupted pass goes on."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.sources import ImageSource, key_of
from ldm_dkdm.files import replacing
from ldm_dkdm.npz import read_arrays
from ldm_dkdm.reporting import Progress, following, logger

SAVE_SECONDS = 60.0  # pause between saves of partial sums
LAYOUT = 2  # version of the cached files; older ones are computed again


def stream(
    source: ImageSource,
    collectors: Mapping[str, Collector],
    cache: Path | None,
    batch_size: int,
    progress: bool | Progress,
    save_seconds: float,
    offset: int = 0,
) -> None:
    """Add all images to all collectors; partial sums are in `partial_file`, at the end the whole ones.

    `offset` is the number of the source's first image among those that are joined.
    """
    partial = partial_file(cache, source, collectors) if cache is not None else None
    done = _resumed(partial, collectors) if partial is not None else 0
    if done:
        logger.info(f"{source.name}: goes on after {done} of {source.count} images")
    saved = time.monotonic()
    with following(progress, f"features of {source.name}", "image", source.count, done) as show:
        for images in source.batches(done, batch_size) if done < source.count else ():
            for collector in collectors.values():
                collector.add(images, offset + done)
            done += len(images)
            show(done)
            due = time.monotonic() - saved >= save_seconds or done == source.count
            if partial is not None and due:
                _save(partial, collectors, done)
                saved = time.monotonic()


def partial_file(cache: Path, source: ImageSource, collectors: Mapping[str, Collector]) -> Path:
    """The file with partial sums of a set of images in these collectors."""
    wanted = [(name, c.extractor.sha256, c.extractor.resize, c.keep) for name, c in sorted(collectors.items())]
    return cache / f"{key_of(LAYOUT, source.identity(), wanted)}.partial.npz"


def _save(partial: Path, collectors: Mapping[str, Collector], done: int) -> None:
    arrays = {f"{name}/{key}": array for name, c in collectors.items() for key, array in c.state().items()}
    with replacing(partial) as temporary, temporary.open("wb") as file:
        np.savez(file, done=np.array(done), **arrays)  # type: ignore[arg-type]  # names of arrays


def _resumed(partial: Path, collectors: Mapping[str, Collector]) -> int:
    """Restore the collectors from partial sums; returns the number of images in them, 0 where the file is damaged."""
    if not partial.is_file():
        return 0
    try:
        with blaming(partial):
            return _restored(partial, collectors)
    except UserError as error:
        logger.warning(f"{error}; it is removed, and all images are read again")
        partial.unlink(missing_ok=True)
        for collector in collectors.values():
            collector.restore({})
        return 0


def _restored(partial: Path, collectors: Mapping[str, Collector]) -> int:
    arrays = read_arrays(partial)
    for name, collector in collectors.items():
        own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
        collector.restore(own)
    return int(arrays["done"])
