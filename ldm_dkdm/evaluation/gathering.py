"""Stream a set of images through extractors: cached by content, resumed where it was interrupted."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from ldm_dkdm import __version__
from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.evaluation.collector import Collector
from ldm_dkdm.evaluation.extractor import SHORT, Extractor
from ldm_dkdm.evaluation.features import FEATURES
from ldm_dkdm.evaluation.partial import LAYOUT, SAVE_SECONDS, partial_file, stream
from ldm_dkdm.evaluation.processes import gather_in_processes
from ldm_dkdm.evaluation.ranks import gather_over_ranks
from ldm_dkdm.evaluation.sources import ImageSource, key_of
from ldm_dkdm.evaluation.statistics import INCEPTION, Statistics
from ldm_dkdm.files import require_place
from ldm_dkdm.model.ranks import joined
from ldm_dkdm.reporting import Progress, in_home, logger


def statistics_cache() -> Path:
    """$LDM_DKDM_CACHE, else $XDG_CACHE_HOME/ldm_dkdm, else ~/.cache/ldm_dkdm; its folder `statistics`."""
    own = os.environ.get("LDM_DKDM_CACHE")
    shared = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(own) if own else shared / "ldm_dkdm") / "statistics"


def require_cache(cache: Path | None) -> None:
    """Refuse a cache that cannot be written, before the images are read whose statistics it should keep.

    Raises:
        UserError: a file, or no permission.
    """
    if cache is not None:
        with naming("cache"):
            require_place(cache, folder=True)


def gather(
    source: ImageSource,
    extractors: Mapping[str, Extractor],
    keep: set[str],
    *,
    cache: Path | None = None,
    batch_size: int = 64,
    progress: bool | Progress = False,
    save_seconds: float = SAVE_SECONDS,
    processes: int = 1,
    fields: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Statistics]:
    """Statistics of a set of images on every extractor's features, in one pass over the images.

    Features are added in float64. Figures depend on the batch size and on the number of processes by rounding only.
    Memory does not grow with the number of images, except for features in `keep`.

    Args:
        source: the images. extractors: by name. keep: names of those whose features metrics need one by one.
        cache: folder of statistics; None: nothing is cached or resumed.
        batch_size: images at once. progress: a bar, or a function.
        save_seconds: between two saves of partial sums. processes: that share the images; see `gather_in_processes`.
        fields: of `Statistics` that metrics read, by extractor; images are read where a file's statistics lack one.

    Raises:
        UserError: images that cannot be read, a cache that cannot be written, or a file with neither images nor
            statistics of these features.
    """
    if source.count:
        source.identity()  # settles what is doubtful before any image is drawn
    ranks = joined()
    found = ranks.on_first(
        lambda: {
            name: _at_hand(source, extractor, name in keep, cache, (fields or {}).get(name, ()))
            for name, extractor in extractors.items()
        }
    )
    missing = {name: Collector(extractors[name], name in keep) for name, known in found.items() if known is None}
    if missing:
        require_cache(cache)
    if missing and ranks.ranks > 1:
        gather_over_ranks(source, missing, ranks, cache, batch_size, progress, save_seconds)
    elif missing and processes > 1:
        gather_in_processes(source, missing, processes, cache, batch_size, progress, save_seconds)
    elif missing:
        stream(source, missing, cache, batch_size, progress, save_seconds)
        if cache is not None:
            partial_file(cache, source, missing).unlink(missing_ok=True)
    gathered = {
        name: collector.statistics(source.count, _facts(source, collector)) for name, collector in missing.items()
    }
    for name, statistics in gathered.items():
        if cache is not None and extractors[name].moments and ranks.first:
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


def _at_hand(
    source: ImageSource, extractor: Extractor, keep: bool, cache: Path | None, fields: Collection[str]
) -> Statistics | None:
    """Statistics in the source's own file, or cached; None if images must be read."""
    stored = source.stored()
    if stored is not None and not keep and fits(stored, extractor) and (not source.count or _has(stored, fields)):
        return stored
    require_images(source, extractor, keep)
    if cache is None or not extractor.moments:
        return None
    file = _file(cache, source, extractor)
    if not file.is_file():
        return None
    known = _cached(file, keep)
    if known is None:
        return None
    if keep and known.features is None:
        return None
    place = f"{in_home(cache)}/{file.stem[:SHORT]}*.npz"
    logger.info(f"{source.name}: statistics of {known.count} images on {extractor.name} are reused: {place}")
    return known


def require_images(source: ImageSource, extractor: Extractor, keep: bool) -> None:
    """Refuse a file of statistics where a metric needs images, or statistics of other features.

    Raises:
        UserError: names the file, and what it holds.
    """
    stored = source.stored()
    if not source.count and (stored is None or keep or not fits(stored, extractor)):
        what = "features one by one, which precision-recall and KID need" if keep else f"images for {extractor.name}"
        raise UserError(f"{source.name}: holds statistics of {_whose(stored)}, not {what}")


def _has(stored: Statistics, fields: Collection[str]) -> bool:
    return all(getattr(stored, name) is not None for name in fields)


def _cached(file: Path, features: bool) -> Statistics | None:
    """Statistics of the cache; None where the file is damaged, which removes it."""
    try:
        known = Statistics.read(file, features)
        if known.mu is None or known.count is None:
            raise UserError(f"{file}: does not hold statistics")
    except UserError as error:
        logger.warning(f"{error}; it is removed, and its statistics are computed again")
        file.unlink(missing_ok=True)
        return None
    return known


def fits(stored: Statistics, extractor: Extractor) -> bool:
    """Whether statistics of a file are of this extractor's features; of the FID's own where they do not say."""
    if "features" in stored.facts:
        return stored.facts["features"] == extractor.name and stored.facts.get("weights_sha256") == extractor.sha256
    assert stored.mu is not None  # a file of statistics holds it
    fids = extractor.name == "inception" and extractor.sha256 == FEATURES["inception"].pinned
    return fids and len(stored.mu) == INCEPTION[0]


def _whose(stored: Statistics | None) -> str:
    if stored is None or stored.mu is None:
        return "nothing"
    facts = stored.facts
    if "features" in facts:
        return f"{facts['features']} features (weights {str(facts.get('weights_sha256'))[:8]})"
    return f"{len(stored.mu)} features"
