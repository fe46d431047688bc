"""What metrics need of two sets of images, checked by their facts before any image is read or drawn."""

from collections.abc import Sequence

from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.extractor import COLOURS
from ldm_dkdm.evaluation.features import FEATURES
from ldm_dkdm.evaluation.metric_figures import features_of
from ldm_dkdm.evaluation.metrics import METRICS
from ldm_dkdm.evaluation.reconstruction import Reconstructions, require_encodable
from ldm_dkdm.evaluation.samples import ModelImages
from ldm_dkdm.evaluation.sources import FolderImages, ImageSource, NpzImages, TensorImages
from ldm_dkdm.first_stage.codec import Codec, LatentCodec

Shape = tuple[int, int, int]  # height, width, channels


def require_comparable_sets(
    own: ImageSource, other: ImageSource | None, chosen: Sequence[str], named: str, size: int | None
) -> None:
    """Refuse sets with too few images for a metric, of different sizes for one on pixels, or that it cannot read.

    Args:
        own, other: the samples and the reference. chosen: the metrics. named: features of metrics that take any.
        size: that of folders' images, if it was given.

    Raises:
        UserError: names the metric, both sets, and their numbers or sizes; or the file that cannot be read.
    """
    for name in chosen:
        metric = METRICS[name]
        sets = [part for part in (own, other if metric.reference else None) if part is not None]
        counts = [_count(part) for part in sets]
        if metric.of is not None and any(count is not None and count < metric.least for count in counts):
            known = [(part.name, count) for part, count in zip(sets, counts, strict=True) if count is not None]
            held = ", ".join(f"{part} has {count}" for part, count in known)
            both = " in both sets" if len(sets) > 1 else ""
            raise UserError(f"metrics: {name} needs {metric.least} images or more{both}; {held}")
        for part in sets:
            _require_readable(part)
            if metric.of is not None:
                _require_colours(part, features_of(metric, named))
        if name == "reconstruction" and other is not None and isinstance(own, ModelImages):
            _require_encodable(own.model.codec(), other)
        if other is not None and metric.of is not None and features_of(metric, named).startswith("pixel"):
            _require_one_shape(name, own, other, size)


def _require_one_shape(metric: str, own: ImageSource, other: ImageSource, size: int | None) -> None:
    a, b = shape_of(own), shape_of(other)
    if a is None or b is None or a == b or repeats_grey(own, other):
        return
    seen = f"the images of {own.name} are {_shown(a)}, those of {other.name} {_shown(b)}"
    resizable = size is None and a[:2] != b[:2] and any(map(_is_folder, (own, other)))
    cure = "; --size (in Python size) crops and resizes the images of folders" if resizable else ""
    raise UserError(f"metrics: {metric} compares pixels; {seen}{cure}")


def repeats_grey(own: ImageSource, other: ImageSource) -> bool:
    """Whether the images of one set are grey and those of the other RGB, of one size."""
    a, b = shape_of(own), shape_of(other)
    return a is not None and b is not None and a[:2] == b[:2] and {a[2], b[2]} == set(COLOURS)


def _require_readable(source: ImageSource) -> None:
    """Refuse files of a folder that cannot be read together, and images that a first stage cannot reconstruct."""
    images = source
    if isinstance(source, Reconstructions):
        images = source.images
        _require_encodable(source.codec, images)
    if isinstance(images, FolderImages):
        images.require_readable()


def _require_colours(source: ImageSource, features: str) -> None:
    """Refuse images that a network of features does not take."""
    shape = shape_of(source)
    channels = source.codec.channels if isinstance(source, Reconstructions) else shape[2] if shape else 3
    if channels not in COLOURS and features in FEATURES and FEATURES[features].build is not None:
        raise UserError(
            f"features: {features} takes grey or RGB images, those of {source.name} have {channels} channels"
        )


def _require_encodable(codec: Codec, images: ImageSource) -> None:
    """Refuse what a first stage does not encode; in pixel space there is none."""
    shape = shape_of(images)
    if shape is None:
        raise UserError(f"metrics: a first stage reconstructs images, {images.name} holds statistics")
    if isinstance(codec, LatentCodec):
        require_encodable(codec, shape)


def _is_folder(source: ImageSource) -> bool:
    return isinstance(source.images if isinstance(source, Reconstructions) else source, FolderImages)


def shape_of(source: ImageSource) -> Shape | None:
    """Height, width and channels of a set's images, known before they are read; None where only statistics are."""
    if isinstance(source, FolderImages):
        return source.side, source.side, source.channels
    if isinstance(source, NpzImages):
        return source.file.shape[1:] if source.count else None
    if isinstance(source, TensorImages):
        height, width, channels = source.images.shape[1:]
        return height, width, channels
    if isinstance(source, ModelImages):
        codec = source.model.codec()
        height, width = (side * codec.downsampling for side in source.model.shape[1:])
        return height, width, codec.channels
    return shape_of(source.images) if isinstance(source, Reconstructions) else None


def _count(source: ImageSource) -> int | None:
    """The number of a set's images, or of those behind its statistics; None where these do not say it."""
    if source.count:
        return source.count
    stored = source.stored()
    return None if stored is None else stored.count


def _shown(shape: Shape) -> str:
    height, width, channels = shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"of {channels} channels")
    return f"{width}x{height} {kind}"
