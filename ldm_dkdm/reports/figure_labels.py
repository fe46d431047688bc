"""Names for figures of one reference that were measured with different settings: the name says what differs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.averaging import UNSAID
from ldm_dkdm.checkpoints.card import AGREEMENT_BY, MEASURED_WITH

MARK = " · "  # between the parts of a figure's name
DIGITS = 8  # digits of a hash in a name
WEIGHTS = "own weights"  # the setting that tells figures of one model alone apart
Settings = Mapping[str, str]  # what figures depend on -> its text in a name; empty where a file does not say it


def labels_of(columns: Sequence[Sequence[tuple[str, Settings]]]) -> list[list[str]]:
    """Names for the figures of several models: of each (reference, settings) the reference, and what differs.

    Figures of two models have one name only if their settings are the same. The weights of a model are in a name where
    one model has figures of several with the same settings.
    """
    groups: dict[str, list[Settings]] = {}
    for own in columns:
        for name, settings in own:
            groups.setdefault(name, []).append(settings)
    differing = {name: _differing(found) for name, found in groups.items()}
    return [_apart(own, differing) for own in columns]


def _differing(found: Sequence[Settings]) -> list[str]:
    keys = dict.fromkeys(key for settings in found for key in settings if key != WEIGHTS)
    return [key for key in keys if len({settings.get(key, "") for settings in found}) > 1]


def _apart(own: Sequence[tuple[str, Settings]], differing: Mapping[str, Sequence[str]]) -> list[str]:
    labels = [_joined(name, *(settings.get(key, "") for key in differing[name])) for name, settings in own]
    counts = Counter(labels)
    named = zip(labels, own, strict=True)
    return [_joined(label, settings.get(WEIGHTS, "")) if counts[label] > 1 else label for label, (_, settings) in named]


def _joined(*parts: str) -> str:
    return MARK.join(filter(None, parts))


def settings_of(tree: Mapping[str, Any]) -> Settings:
    """What the figures in a file depend on: evaluation.json of a student, or a record of two sets."""
    if isinstance(tree.get("figures"), Mapping):
        return _of_record(_mapping(tree, "samples"), _mapping(tree, "reference"))
    options = _options(tree.get(MEASURED_WITH))
    others = {"teacher": _hash("teacher", tree.get("teacher_sha256")), "precision": _text("precision", tree)}
    return {**options, **others, WEIGHTS: _hash("weights", tree.get("student_sha256"))}


def _of_record(samples: Mapping[str, Any], reference: Mapping[str, Any]) -> Settings:
    images, first = samples.get("images"), _first(samples)
    theirs, second = reference.get("images"), _first(reference)
    usual = first is not None and isinstance(images, int) and second == first + images
    weights, file = samples.get("weights"), Path(str(samples.get("opened_from") or ""))
    found = {
        "images": "" if images is None else f"{images} images",
        "sampler": str(samples.get("sampler") or ""),
        "steps": "" if samples.get("steps") is None else f"{samples['steps']} steps",
        "eta": _text("eta", samples),
        "seed": "" if first is None else f"seed {first}",
        "labels": _text("labels", samples),
        "guidance": _text("guidance", samples),
        "arithmetic": _text("arithmetic", samples),
        "weights": "weights unsaid" if weights == UNSAID else str(weights or ""),
        "checkpoint": file.stem if file.parent.name == "checkpoints" else "",
        **{key: _text(key, samples) for key in ("size", "resized", "rounding")},
        **_options(samples.get(AGREEMENT_BY)),
        "reference": _hash("reference", reference.get("sha256")),
        "reference images": "" if theirs in (None, images) else f"reference of {theirs} images",
        "reference seed": "" if second is None or usual else f"reference seed {second}",
    }
    for key in ("sampler", "steps", "eta", "labels", "guidance", "size", "resized", "rounding"):
        own = reference.get(key)
        found[f"reference {key}"] = "" if own in (None, samples.get(key)) else _text(f"reference {key}", reference, key)
    return {**found, WEIGHTS: _hash("weights", samples.get("sha256"))}


def _mapping(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


def _first(facts: Mapping[str, Any]) -> int | None:
    """The first seed of a set of samples."""
    first = str(facts.get("seeds") or "").partition(" ")[0]
    return int(first) if first.isdecimal() else None


def _options(measured_with: Any) -> dict[str, str]:
    """The options in a line such as `ldm_dkdm 0.2.0: dkdm evaluate -n 70 -c 20`, by flag."""
    words = str(measured_with or "").partition("dkdm evaluate ")[2].split()
    return {flag: f"{flag} {value}" for flag, value in zip(words[::2], words[1::2], strict=False)}


def _text(title: str, facts: Mapping[str, Any], key: str | None = None) -> str:
    value = facts.get(key or title)
    if value is None:
        return ""
    return f"{title} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _hash(title: str, digest: Any) -> str:
    return f"{title} {str(digest)[:DIGITS]}" if digest else ""
