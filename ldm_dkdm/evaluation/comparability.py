"""Say where figures would not be comparable with published ones, or with each other."""

from collections.abc import Iterable, Mapping
from typing import Any

from ldm_dkdm.first_stage.codec import TRUNCATED

FEW = 10_000  # samples below which Frechet distances and Inception scores depend strongly on the number
BIASED = {"fid", "sfid", "is", "fd", "fd-dinov2", "precision-recall", "pixel-frechet"}  # metrics that do
ALONE = {"is"}  # those that measure the samples alone


def size_fact(height: int, width: int) -> int | str:
    """The size of images as provenance says it: the side of squares, else width x height, such as 64x32."""
    return height if height == width else f"{width}x{height}"


def doubts(samples: Mapping[str, Any], reference: Mapping[str, Any] | None, metrics: Iterable[str]) -> list[str]:
    """Sentences about two sets of images, from their facts; empty where nothing stands against a comparison."""
    sets = {"samples": samples} | ({} if reference is None else {"reference": reference})
    metrics = set(metrics)
    found = [*_few(sets, metrics), *_lossy(sets)]
    rounding = samples.get("rounding")
    if rounding and rounding != TRUNCATED and metrics - {"agreement"}:
        other = "unknown" if reference is None else reference.get("rounding") or "unknown"
        found.append(f"8-bit rounding: samples {rounding}, published ones {TRUNCATED}; reference {other}")
    return found if reference is None else [*found, *_differences(samples, reference)]


def _few(sets: Mapping[str, Mapping[str, Any]], metrics: set[str]) -> list[str]:
    biased = BIASED & metrics
    compared = sets if metrics & (BIASED - ALONE) else {"samples": sets["samples"]}
    counts = {name: facts.get("images in statistics") or facts.get("images") for name, facts in compared.items()}
    few = {name: count for name, count in counts.items() if biased and count is not None and count < FEW}
    named = sorted(biased if "samples" in few else biased - ALONE)
    verb = "depends" if len(named) == 1 else "depend"
    why = f"are fewer than {FEW:,}; {', '.join(named)} {verb} on their number, kid does not"
    return [f"{' and '.join(few)}: {_numbers(few, 'images')} {why}"] if few else []


def _lossy(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lossy = {name: facts["lossy"] for name, facts in sets.items() if facts.get("lossy")}
    why = "are JPEG or lossy WebP, whose compression moves every feature; use PNG or .npz"
    return [f"{' and '.join(lossy)}: {_numbers(lossy, 'files')} {why}"] if lossy else []


def _numbers(counts: Mapping[str, int], noun: str) -> str:
    """The numbers of one or both sets: 70 images, 70 images each, or 70 and 80 images."""
    numbers = [str(count) for count in counts.values()]
    same = len(set(numbers)) < len(numbers)
    return f"{numbers[0]} {noun} each" if same else f"{' and '.join(numbers)} {noun}"


def _differences(samples: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    found = []
    own, other = samples.get("size"), reference.get("size")
    if own and other and own != other:
        sizes = [f"{size}x{size}" if isinstance(size, int) else size for size in (own, other)]
        found.append(f"the samples are {sizes[0]}, the reference {sizes[1]}; features see the resize")
    own, other = (facts.get("resized") or "none" for facts in (samples, reference))
    if own != other:
        found.append(f"resize of the files: samples {own}; reference {other}; features see it")
    own, other = samples.get("rounding"), reference.get("rounding")
    if own == TRUNCATED and other and own != other:
        found.append(f"8-bit rounding differs: samples {own}; reference {other}")
    return found
