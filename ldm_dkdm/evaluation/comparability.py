"""Say where figures would not be comparable with published ones, or with each other."""

from collections.abc import Iterable, Mapping
from typing import Any

from ldm_dkdm.first_stage.codec import TRUNCATED

FEW = 10_000  # samples below which Frechet distances and Inception scores depend strongly on the number
BIASED = {"fid", "sfid", "is", "fd", "fd-dinov2", "pixel-frechet"}  # metrics that do


def doubts(samples: Mapping[str, Any], reference: Mapping[str, Any] | None, metrics: Iterable[str]) -> list[str]:
    """Sentences about two sets of images, from their facts; empty where nothing stands against a comparison."""
    sets = {"samples": samples} | ({} if reference is None else {"reference": reference})
    found, metrics = [], set(metrics)
    biased = sorted(BIASED & metrics)
    if biased:
        for name, facts in sets.items():
            images = facts.get("images in statistics") or facts.get("images")
            if images is not None and images < FEW:
                found.append(
                    f"{name}: {images} images are fewer than {FEW:,}; {', '.join(biased)} depend on their number, "
                    "kid does not"
                )
    for name, facts in sets.items():
        if facts.get("jpeg"):
            found.append(
                f"{name}: {facts['jpeg']} files are JPEG, whose compression moves every feature; use PNG or .npz"
            )
    rounding = samples.get("rounding")
    if rounding and rounding != TRUNCATED and set(metrics) - {"agreement"}:
        other = "unknown" if reference is None else reference.get("rounding") or "unknown"
        found.append(f"8-bit rounding: samples {rounding}, published ones {TRUNCATED}; reference {other}")
    if reference is not None:
        found += _differences(samples, reference)
    return found


def _differences(samples: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    found = []
    own, other = samples.get("size"), reference.get("size")
    if own and other and own != other:
        found.append(f"the samples are {own}x{own}, the reference {other}x{other}; features see the resize")
    own, other = samples.get("rounding"), reference.get("rounding")
    if own == TRUNCATED and other and own != other:
        found.append(f"8-bit rounding differs: samples {own}; reference {other}")
    return found
