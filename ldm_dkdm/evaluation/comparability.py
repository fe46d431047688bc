"""Say where figures would not be comparable with published ones, or with each other."""

from collections.abc import Iterable, Mapping
from typing import Any

from ldm_dkdm.first_stage.codec import TRUNCATED

FEW = 10_000  # samples below which Frechet distances and Inception scores depend strongly on the number
BIASED = {"fid", "sfid", "is", "fd", "fd-dinov2", "precision-recall", "pixel-frechet"}  # metrics that do


def doubts(samples: Mapping[str, Any], reference: Mapping[str, Any] | None, metrics: Iterable[str]) -> list[str]:
    """Sentences about two sets of images, from their facts; empty where nothing stands against a comparison."""
    sets = {"samples": samples} | ({} if reference is None else {"reference": reference})
    metrics = set(metrics)
    found = [sentence for name, facts in sets.items() for sentence in _few(name, facts, metrics)]
    found += [
        f"{name}: {facts['lossy']} files are JPEG or lossy WebP, whose compression moves every feature; use PNG or .npz"
        for name, facts in sets.items()
        if facts.get("lossy")
    ]
    rounding = samples.get("rounding")
    if rounding and rounding != TRUNCATED and metrics - {"agreement"}:
        other = "unknown" if reference is None else reference.get("rounding") or "unknown"
        found.append(f"8-bit rounding: samples {rounding}, published ones {TRUNCATED}; reference {other}")
    return found if reference is None else [*found, *_differences(samples, reference)]


def _few(name: str, facts: Mapping[str, Any], metrics: set[str]) -> list[str]:
    biased, images = sorted(BIASED & metrics), facts.get("images in statistics") or facts.get("images")
    if not biased or images is None or images >= FEW:
        return []
    verb = "depends" if len(biased) == 1 else "depend"
    return [f"{name}: {images} images are fewer than {FEW:,}; {', '.join(biased)} {verb} on their number, kid does not"]


def _differences(samples: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    found = []
    own, other = samples.get("size"), reference.get("size")
    if own and other and own != other:
        found.append(f"the samples are {own}x{own}, the reference {other}x{other}; features see the resize")
    own, other = (facts.get("resized") or "none" for facts in (samples, reference))
    if own != other:
        found.append(f"resize of the files: samples {own}; reference {other}; features see it")
    own, other = samples.get("rounding"), reference.get("rounding")
    if own == TRUNCATED and other and own != other:
        found.append(f"8-bit rounding differs: samples {own}; reference {other}")
    return found
