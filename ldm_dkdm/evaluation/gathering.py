"""Stream a set of images through extractors: cached by content, resumed where it was interrupted."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm_dkdm import __version__
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.sources import ImageSource, key_of
from ldm_dkdm.evaluation.statistics import INCEPTION, Statistics
from ldm_dkdm.files import replacing
from ldm_dkdm.reporting import Progress, following, logger

SAVE_SECONDS = 60.0  # between two saves of partial sums
LAYOUT = 1  # of the cached files; a change makes them unfit


def statistics_cache() -> Path:
    """$LDM_DKDM_CACHE, else $XDG_CACHE_HOME/ldm_dkdm, else ~/.cache/ldm_dkdm; its folder `statistics`."""
    own = os.environ.get("LDM_DKDM_CACHE")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(own) if own else shared / "ldm_dkdm") / "statistics"


def gather(
    source: ImageSource,
    extractors: Mapping[str, Extractor],
    keep: set[str],
    *,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool | Progress = False,
    save_seconds: float = SAVE_SECONDS,
) -> dict[str, Statistics]:
    """Statistics of a set of images on every extractor's features, in one pass over the images.

    Features are added in the order of the images, in float64; figures depend on the batch size only by the rounding of
    the networks. Memory does not grow with the number of images, except for features in `keep`.

    Args:
        source: the images. extractors: by name. keep: names of those whose features metrics need one by one.
        cache: folder of statistics; None: nothing is cached or resumed.
        batch_size: images at once. progress: a bar, or a function.
        save_seconds: between two saves of partial sums.

    Raises:
        UserError: images that cannot be read, or a file with neither images nor statistics of these features.
    """
    found = {name: _at_hand(source, extractor, name in keep, cache) for name, extractor in extractors.items()}
    missing = {name: Collector(extractors[name], name in keep) for name, known in found.items() if known is None}
    if missing:
        _pass(source, missing, cache, batch_size, progress, save_seconds)
    gathered = {
        name: collector.statistics(source.count, _facts(source, collector)) for name, collector in missing.items()
    }
    for name, statistics in gathered.items():
        if cache is not None and extractors[name].moments:
            statistics.write(_file(cache, source, extractors[name]))
    at_hand = {name: statistics for name, statistics in found.items() if statistics is not None}
    return {name: _with_stored(source, extractors[name], part) for name, part in {**at_hand, **gathered}.items()}


def _with_stored(source: ImageSource, extractor: Extractor, gathered: Statistics) -> Statistics:
    """Mean and covariance as the file stores them: guided-diffusion's hold those of more images than are in it."""
    stored = source.stored()
    if stored is None or not fits(stored, extractor):
        return gathered
    named = {name: getattr(stored, name) for name in ("mu", "sigma", "mu_s", "sigma_s")}
    return replace(gathered, count=stored.count, **{name: array for name, array in named.items() if array is not None})


def _facts(source: ImageSource, collector: Collector) -> dict[str, object]:
    return {"source": source.facts(), **collector.extractor.facts(), "ldm_dkdm": __version__}


def _file(cache: Path, source: ImageSource, extractor: Extractor) -> Path:
    key = key_of(LAYOUT, source.identity(), extractor.name, extractor.sha256, extractor.resize)
    return cache / f"{key}.npz"


def _at_hand(source: ImageSource, extractor: Extractor, keep: bool, cache: Path | None) -> Statistics | None:
    """Statistics in the source's own file, or cached; None if images must be read."""
    stored = source.stored()
    if stored is not None and not keep and fits(stored, extractor):
        return stored
    if not source.count:
        what = "features one by one, which precision-recall and KID need" if keep else f"images for {extractor.name}"
        raise UserError(f"{source.name}: holds statistics of {_whose(stored)}, not {what}")
    if cache is None or not extractor.moments:
        return None
    file = _file(cache, source, extractor)
    if not file.is_file():
        return None
    known = Statistics.read(file, features=keep)
    if keep and known.features is None:
        return None
    logger.info(f"{source.name}: statistics of {known.count} images on {extractor.name} are reused: {file}")
    return known


def fits(stored: Statistics, extractor: Extractor) -> bool:
    """Whether statistics of a file are of this extractor's features; those without provenance are Inception's."""
    if "features" in stored.facts:
        return stored.facts["features"] == extractor.name and stored.facts.get("weights_sha256") == extractor.sha256
    assert stored.mu is not None  # a file of statistics holds it
    return extractor.name == "inception" and len(stored.mu) == INCEPTION[0]


def _whose(stored: Statistics | None) -> str:
    if stored is None or stored.mu is None:
        return "nothing"
    facts = stored.facts
    if "features" in facts:
        return f"{facts['features']} features (weights {str(facts.get('weights_sha256'))[:8]})"
    return f"{len(stored.mu)} features"


def _pass(
    source: ImageSource,
    collectors: Mapping[str, Collector],
    cache: Path | None,
    batch_size: int,
    progress: bool | Progress,
    save_seconds: float,
) -> None:
    """Add all images to all collectors; partial sums are saved, and removed at the end."""
    partial = _partial_file(cache, source, collectors) if cache is not None else None
    done = _resumed(partial, collectors) if partial is not None else 0
    if done:
        logger.info(f"{source.name}: goes on after {done} of {source.count} images")
    saved = time.monotonic()
    with following(progress, f"features of {source.name}", "image", source.count, done) as show:
        for images in source.batches(done, batch_size) if done < source.count else ():
            for collector in collectors.values():
                collector.add(images, done)
            done += len(images)
            show(done)
            if partial is not None and done < source.count and time.monotonic() - saved >= save_seconds:
                _save(partial, collectors, done)
                saved = time.monotonic()
    if partial is not None:
        partial.unlink(missing_ok=True)


def _partial_file(cache: Path, source: ImageSource, collectors: Mapping[str, Collector]) -> Path:
    wanted = [(name, c.extractor.sha256, c.extractor.resize, c.keep) for name, c in sorted(collectors.items())]
    return cache / f"{key_of(LAYOUT, source.identity(), wanted)}.partial.npz"


def _save(partial: Path, collectors: Mapping[str, Collector], done: int) -> None:
    arrays = {f"{name}/{key}": array for name, c in collectors.items() for key, array in c.state().items()}
    with replacing(partial) as temporary, temporary.open("wb") as file:
        np.savez(file, done=np.array(done), **arrays)  # type: ignore[arg-type]  # names of arrays


def _resumed(partial: Path, collectors: Mapping[str, Collector]) -> int:
    """Restore the collectors from partial sums; returns the number of images in them."""
    if not partial.is_file():
        return 0
    with blaming(partial), np.load(partial, allow_pickle=False) as archive:
        arrays = dict(archive)
    for name, collector in collectors.items():
        own = {key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")}
        collector.restore(own)
    return int(arrays["done"])
