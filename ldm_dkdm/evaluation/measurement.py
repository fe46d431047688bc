"""Measure a set of images, alone or against another: the figures of METRICS with their provenance."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ldm_dkdm import __version__
from ldm_dkdm.checkpoints.card import AGREEMENT_BY, MEASURED_WITH
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.device import default_device, resolve_device
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.evaluation.comparability import doubts
from ldm_dkdm.evaluation.comparison import CHAINS, PAIRS
from ldm_dkdm.evaluation.components import NAME as PIXEL_COMPONENTS
from ldm_dkdm.evaluation.components import pixel_components
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.features import named_features, open_extractor
from ldm_dkdm.evaluation.gathering import statistics_cache
from ldm_dkdm.evaluation.metric_figures import MetricFigures, features_of
from ldm_dkdm.evaluation.metrics import DEFAULTS, METRICS
from ldm_dkdm.evaluation.opening import Images, open_images, taken
from ldm_dkdm.evaluation.perceptual import LPIPS_FACTS, Lpips, announced, find_lpips
from ldm_dkdm.evaluation.reconstruction import Reconstructions
from ldm_dkdm.evaluation.requirements import repeats_grey, require_comparable_sets
from ldm_dkdm.evaluation.samples import ModelImages
from ldm_dkdm.evaluation.sources import FolderImages, ImageSource, NpzImages
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.arguments import path_of
from ldm_dkdm.model.facts import whole
from ldm_dkdm.reporting import Progress, logger

COUNT = 10_000  # samples of a model


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`.

    Attributes:
        figures: by name, such as FID or KID-efficientnet.
        samples, reference: provenance of both sets. features: of the extractors.
        warnings: why figures may not be comparable.
        statistics: of the samples, by extractor.
    """

    figures: dict[str, Any]
    samples: dict[str, Any]
    reference: dict[str, Any] | None
    features: list[dict[str, str | None]]
    warnings: list[str]
    statistics: Mapping[str, Statistics] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """All but the statistics, as JSON holds it."""
        own = {"figures": self.figures, "samples": self.samples, "reference": self.reference}
        return {**own, "features": self.features, "warnings": self.warnings, "ldm_dkdm": __version__}


def measure(
    samples: Images,
    reference: Images | None = None,
    *,
    metrics: str | Sequence[str] | None = None,
    features: str | Path = "inception",
    count: int | None = None,
    steps: int | None = None,
    sampler: str = "ddim",
    eta: float = 0.0,
    seed: int = 0,
    reference_seed: int | None = None,
    labels: Sequence[int] = (),
    batch_size: int = 64,
    size: int | None = None,
    chains: int | None = None,
    pairs: int | None = None,
    lpips: str | Path | None = None,
    cache: str | Path | None = None,
    device: str | torch.device | None = None,
    processes: int = 1,
    progress: bool | Progress = False,
) -> Measurement:
    """Figures of a set of images, with provenance and warnings.

    Args:
        samples: a model (it is sampled), a model's path, a folder of images, an .npz of images or statistics, images
            uint8 (N,H,W,C) as a tensor or NumPy array; or a first stage's path: its reconstructions of the reference.
        reference: another such set; not needed by `is`.
        metrics: names in METRICS, or one; default: those that suit the features and the sets.
        features: a name in FEATURES, or a file with weights of one, for metrics that take any.
        count: samples of each model, by default COUNT. steps, sampler, eta, labels: as in `DiffusionModel.sample`.
        seed: sample i of `samples` depends on seed + i only; of a model as `reference` on `reference_seed` + i, by
            default seed + count. The chains and images of `agreement` depend on seed.
        batch_size: images at once. size: side to which folders' images are cropped and resized.
        chains, pairs, lpips: of `agreement`, as in `evaluate`, with its defaults; lpips also of `reconstruction`.
        cache: folder of statistics; default: `statistics_cache()`.
        device: of extractors and of models opened here; default: that of the model in `samples`, else the fastest.
        processes: that share the images, each on a GPU of its own if there are several. progress: bars, or a function.

    Raises:
        UserError: an unknown name, missing weights, a set that a metric cannot take, too few images.
    """
    _at_least(1, count=count, batch_size=batch_size, size=size, chains=chains, pairs=pairs, processes=processes)
    named, weights = named_features(features)
    chosen = chosen_metrics([metrics] if isinstance(metrics, str) else metrics, named, reference is not None)
    where = (device and resolve_device(str(device))) or getattr(samples, "device", None) or default_device("auto")
    config = SamplingConfig(COUNT if count is None else count, batch_size, seed, steps, eta, sampler, labels)
    own, other = _opened(samples, reference, config, reference_seed, size, where)
    require_effect((draws(own, chosen), draws(other, chosen, True)), config, reference_seed, count, chosen)
    perceptual = _lpips(lpips, chosen)
    _require_use(chosen, (own, other), size, chains=chains, pairs=pairs)
    require_comparable_sets(own, other, chosen, named, size)
    extractors = _open_extractors(chosen, named, weights, where)
    folder = path_of(cache or statistics_cache(), "cache")
    options = {"cache": folder, "batch_size": batch_size, "progress": progress}
    other = _with_pixels(extractors, chosen, own, other, **options)
    agreeing = _agreeing(config, chains, pairs, lpips=perceptual)
    work = MetricFigures(extractors, named, batch_size, folder, progress, agreeing, perceptual, processes)
    return _measurement(own, other, chosen, extractors.values(), *work.of(chosen, own, other))


def _agreeing(config: SamplingConfig, chains: int | None, pairs: int | None, **others: Any) -> dict[str, Any]:
    """What `agreement` is measured with."""
    sizes = {"chains": int(chains or CHAINS), "pairs": int(pairs or PAIRS)}
    return {**sizes, "steps": config.steps, "seed": config.seed, **others}


def _opened(
    samples: Images,
    reference: Images | None,
    config: SamplingConfig,
    reference_seed: int | None,
    size: int | None,
    where: str | torch.device,
) -> tuple[ImageSource, ImageSource | None]:
    """Both sets of images."""
    samples, reference = taken(samples, "samples"), None if reference is None else taken(reference, "reference")
    second = replace(config, seed=_second(config.seed, config.count, reference_seed))
    other = None if reference is None else open_images(reference, second, size, where)
    return open_images(samples, config, size, where, other), other


def _open_extractors(
    chosen: Iterable[str], named: str, weights: Path | None, where: str | torch.device
) -> dict[str, Extractor]:
    """The extractors of metrics by name, but for the components of pixels, which follow from the reference."""
    names = dict.fromkeys(features_of(METRICS[name], named) for name in chosen if METRICS[name].of)
    opened = [name for name in names if name != PIXEL_COMPONENTS]
    return {name: open_extractor((name == named and weights) or name, where) for name in opened}


def _with_pixels(
    extractors: dict[str, Extractor], chosen: Sequence[str], own: ImageSource, other: ImageSource | None, **options: Any
) -> ImageSource | None:
    """Complete the extractors of pixels by what follows from both sets; the reference, whose first samples may stay."""
    components = any(METRICS[name].features == PIXEL_COMPONENTS for name in chosen)
    if other is None or not (components or "pixels" in extractors):
        return other
    rgb = repeats_grey(own, other)
    if rgb:
        logger.info(f"pixels of {own.name} and {other.name}: the grey images are repeated to RGB, as the others are")
        extractors |= {name: one.repeating_grey() for name, one in extractors.items() if name == "pixels"}
    if components:
        extractors[PIXEL_COMPONENTS], other = pixel_components(other, rgb=rgb, **options)
    return other


def _at_least(least: int, **numbers: int | None) -> None:
    """Refuse numbers below the least, by name."""
    for name, value in numbers.items():
        whole(value, name, least)


def _measurement(
    own: ImageSource,
    other: ImageSource | None,
    chosen: Sequence[str],
    extractors: Iterable[Extractor],
    figures: dict[str, Any],
    statistics: Mapping[str, Statistics],
) -> Measurement:
    facts, theirs = _facts(own, chosen), None if other is None else _facts(other, chosen, True)
    if MEASURED_WITH in figures:
        facts[AGREEMENT_BY] = figures.pop(MEASURED_WITH)
    used = [extractor.facts() for extractor in extractors]
    used += [LPIPS_FACTS] if any(name.lower() == "lpips" for name in figures) else []
    return Measurement(figures, facts, theirs, used, doubts(facts, theirs, chosen), statistics)


def _facts(source: ImageSource, chosen: Sequence[str], second: bool = False) -> dict[str, Any]:
    """Provenance of a set; a model that is not sampled has no number of images."""
    if isinstance(source, ModelImages) and not draws(source, chosen, second):
        return {**source.model_facts(), "images": None}
    return source.facts()


def draws(source: ImageSource | None, chosen: Sequence[str], second: bool = False) -> bool:
    """Whether metrics sample a set: it is a model, and one of them compares features, or reconstructs the reference."""
    used = any(METRICS[name].of and (METRICS[name].reference or not second) for name in chosen)
    return (used or (second and "reconstruction" in chosen)) and isinstance(source, ModelImages)


def require_effect(
    sources: Sequence[bool],
    config: SamplingConfig,
    reference_seed: int | None,
    count: int | None = None,
    chosen: Sequence[str] = (),
) -> None:
    """Refuse the sampling of models where none is sampled.

    Args:
        sources: whether the samples and the reference are sampled.
        count: the number of samples if it was given.
        chosen: the metrics; agreement has images of its own.

    Raises:
        UserError: an option without effect.
    """
    given = {
        "steps": config.steps is not None and "agreement" not in chosen,
        "count": count is not None,
        "sampler": config.sampler != "ddim",
        "eta": bool(config.eta),
        "labels": bool(config.labels),
    }
    unused = [name for name, is_given in given.items() if is_given and not any(sources)]
    unused += ["reference_seed"] if reference_seed is not None and not sources[1] else []
    if unused:
        raise UserError(f"{unused[0]}: has no effect; no model is sampled for it")


def _require_use(
    chosen: Sequence[str], sets: Iterable[ImageSource | None], size: int | None, **of_agreement: int | None
) -> None:
    """Refuse options of `agreement` without it, and a size where no set comes from files."""
    given = [name for name, value in of_agreement.items() if value is not None]
    if given and "agreement" not in chosen:
        raise UserError(f"{given[0]}: has no effect; it is an option of agreement, which is not measured")
    files = [part.images if isinstance(part, Reconstructions) else part for part in sets]
    if size is not None and not any(isinstance(part, FolderImages | NpzImages) for part in files):
        raise UserError("size: has no effect; it is that of a folder's images, and neither set is a folder")


def _lpips(file: str | Path | None, chosen: Sequence[str]) -> Lpips | None:
    """LPIPS for the metrics that measure it. A file that none of them reads is refused."""
    if {"agreement", "reconstruction"} & set(chosen):
        return announced(find_lpips(file))
    if file is not None:
        raise UserError("lpips: has no effect; agreement and reconstruction measure LPIPS")
    return None


def against_teacher(
    student: DiffusionModel, teacher: DiffusionModel, figures: Mapping[str, Any], config: SamplingConfig, drawn: bool
) -> Measurement:
    """The provenance of figures of `evaluate`, as `measure` gives it.

    Args:
        config: as `evaluate` samples the student; the teacher's seeds begin at seed + count.
        drawn: whether there are images for the Frechet distance.
    """
    chosen = ["agreement", *(["pixel-frechet"] if drawn else [])]
    used = [open_extractor("pixels", "cpu")] if drawn else []
    own = ModelImages(student, config, str(student.path or "student"))
    other = ModelImages(teacher, replace(config, seed=config.seed + config.count), str(teacher.path or "teacher"))
    return _measurement(own, other, chosen, used, dict(figures), {})


def _second(seed: int, count: int, given: int | None) -> int:
    """The first seed of the reference: one that the samples do not use, unless it is given."""
    _at_least(0, seed=seed, reference_seed=given)
    return seed + count if given is None else given


def chosen_metrics(metrics: Sequence[str] | None, features: str, reference: bool) -> list[str]:
    """The metrics that are asked for, or those that suit the features.

    Raises:
        UserError: an unknown name, or one that needs a reference where there is none.
    """
    if metrics is None:
        usual = DEFAULTS.get(features, DEFAULTS[""])
        metrics = [name for name in usual if reference or not METRICS[name].reference]
        if not metrics:
            raise UserError(f"reference: {', '.join(usual)} compare with a second set of images; name it")
    if isinstance(metrics, str) or not isinstance(metrics, Iterable) or not (metrics := list(metrics)):
        raise UserError(f"metrics: expected names, got {metrics!r}; choose from {', '.join(METRICS)}, or leave it out")
    for name in metrics:
        if (features, name) == ("pixels", "fd"):
            raise UserError("metrics: fd needs the features of a network; pixel-frechet is the distance on pixels")
        if pick(METRICS, name, "metrics").reference and not reference:
            raise UserError(f"reference: {name} compares with a second set of images; name it")
    return list(dict.fromkeys(metrics))
