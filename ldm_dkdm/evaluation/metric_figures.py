"""Gather the statistics that metrics need, and compute their figures."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.comparison import evaluate, require_comparable
from ldm_dkdm.evaluation.extractor import Extractor
from ldm_dkdm.evaluation.gathering import gather, require_images
from ldm_dkdm.evaluation.metrics import METRICS, Metric, Pair
from ldm_dkdm.evaluation.perceptual import Lpips
from ldm_dkdm.evaluation.reconstruction import Reconstructions, reconstruction
from ldm_dkdm.evaluation.samples import ModelImages
from ldm_dkdm.evaluation.sources import ImageSource
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.evaluation.weights import INSTALL
from ldm_dkdm.first_stage.codec import Codec, LatentCodec
from ldm_dkdm.model.ranks import joined
from ldm_dkdm.reporting import Progress


def features_of(metric: Metric, named: str) -> str:
    """The extractor of a metric: its own, or the named one."""
    return metric.features or named


@dataclass(frozen=True)
class MetricFigures:
    """Gathers statistics and computes figures.

    Attributes:
        extractors: by name. named: the one of metrics that take any.
        batch_size: images at once. cache: folder of statistics.
        progress: a bar, or a function. agreeing: arguments of `evaluate`.
        lpips: of a reconstruction. processes: that share the images.
    """

    extractors: Mapping[str, Extractor]
    named: str
    batch_size: int
    cache: Path
    progress: bool | Progress
    agreeing: Mapping[str, Any]
    lpips: Lpips | None
    processes: int

    def of(
        self, chosen: Sequence[str], own: ImageSource, other: ImageSource | None
    ) -> tuple[dict[str, Any], dict[str, Statistics]]:
        """Figures by name, and the samples' statistics by extractor."""
        by_features = [name for name in chosen if METRICS[name].of]
        comparing = [name for name in by_features if METRICS[name].reference]
        self._require(chosen, own, other, ((own, by_features), (other, comparing)))
        found = self._gather(own, by_features)
        theirs = {} if other is None else self._gather(other, comparing)
        figures: dict[str, Any] = {}
        for name in chosen:
            with _naming_packages(name):
                if METRICS[name].of is not None:
                    figures |= joined().on_first(partial(self._compared, METRICS[name], found, theirs))
                elif other is not None:
                    figures |= self._without_features(name, own, other)
        return figures, found

    def _compared(
        self, metric: Metric, found: Mapping[str, Statistics], theirs: Mapping[str, Statistics]
    ) -> Mapping[str, float]:
        """Figures of a metric that compares features."""
        assert metric.of is not None  # asked for such a metric
        key = features_of(metric, self.named)
        return metric.of(Pair(found[key], theirs.get(key), self.extractors[key]))

    def _require(
        self,
        chosen: Sequence[str],
        own: ImageSource,
        other: ImageSource | None,
        gathered: Iterable[tuple[ImageSource | None, Sequence[str]]],
    ) -> None:
        """Refuse sets of a kind that a metric cannot take, before any image is read or drawn."""
        for source, metrics in gathered:
            if source is None:
                continue
            for name, keep in self._needs(metrics).items():
                require_images(source, self.extractors[name], keep)
            for name in metrics:
                _require_fields(source, name)
        for name in chosen:
            with _naming_packages(name):
                for package in METRICS[name].packages:
                    import_module(package)
        if "agreement" in chosen:
            if not (isinstance(own, ModelImages) and isinstance(other, ModelImages)):
                raise UserError("metrics: agreement compares two models, not images")
            require_comparable(own.model, other.model)
        if "reconstruction" in chosen and not isinstance(_codec(own), LatentCodec):
            raise UserError("metrics: reconstruction measures a first stage, or a model on latents, on images")

    def _needs(self, metrics: Sequence[str]) -> dict[str, bool]:
        """The extractors of metrics by name, and whether one of them needs features one by one."""
        needs = {features_of(METRICS[name], self.named): False for name in metrics}
        return needs | {features_of(METRICS[name], self.named): True for name in metrics if METRICS[name].keep}

    def _gather(self, source: ImageSource, metrics: Sequence[str]) -> dict[str, Statistics]:
        needs = self._needs(metrics)
        extractors = {name: self.extractors[name] for name in needs}
        keep = {name for name, kept in needs.items() if kept}
        if not extractors:
            return {}
        fields = {
            key: [f for n in metrics if features_of(METRICS[n], self.named) == key for f in METRICS[n].fields]
            for key in needs
        }
        options = {"fields": fields, "cache": self.cache, "batch_size": self.batch_size, "progress": self.progress}
        return gather(source, extractors, keep, processes=self.processes, **options)  # type: ignore[arg-type]  # a dict

    def _without_features(self, name: str, own: ImageSource, other: ImageSource) -> dict[str, Any]:
        """Figures of metrics that compare models, or a first stage with its input."""
        if name == "agreement":
            assert isinstance(own, ModelImages) and isinstance(other, ModelImages)  # `_require` has seen them
            options = {"batch_size": self.batch_size, "cache": self.cache, "progress": self.progress, **self.agreeing}
            return evaluate(own.model, other.model, images=0, **options)
        codec = _codec(own)
        assert isinstance(codec, LatentCodec)
        images = own.images if isinstance(own, Reconstructions) else other
        return joined().on_first(lambda: reconstruction(codec, images, self.batch_size, self.progress, self.lpips))


@contextmanager
def _naming_packages(metric: str) -> Iterator[None]:
    """Say which package a metric needs, where it is not installed."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"metrics: {metric} needs the package {error.name}; {INSTALL}") from error


def _require_fields(source: ImageSource, metric: str) -> None:
    """Refuse a file of statistics that lacks some that a metric reads."""
    stored = None if source.count else source.stored()
    lacking = [name for name in METRICS[metric].fields if stored is not None and getattr(stored, name) is None]
    if lacking:
        missing = " and ".join(lacking)
        raise UserError(
            f"metrics: {metric} needs {missing}, which the statistics in {source.name} lack; give its images"
        )


def _codec(source: ImageSource) -> Codec | None:
    """The first stage of a model, or of reconstructions."""
    return source.model.codec() if isinstance(source, ModelImages) else getattr(source, "codec", None)
