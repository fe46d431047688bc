"""evaluation.json: the figures of a student that `dkdm evaluate -r` keeps beside it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.card import EARLIER, MEASURED_WITH
from ldm_dkdm.errors import MALFORMED, UserError
from ldm_dkdm.evaluation.json_files import write_json
from ldm_dkdm.evaluation.results import SPEED
from ldm_dkdm.evaluation.sources import key_of
from ldm_dkdm.files import JSON_BYTES, read_text

SETTINGS = {  # what figures depend on -> how a line says that it differs
    MEASURED_WITH: "",
    "student_sha256": "other weights",
    "teacher_sha256": "another teacher",
    "precision": "another precision",
}


def write_figures(path: Path, figures: Mapping[str, Any], keep: bool = True) -> str | None:
    """Write figures of a student; those that the file had before, measured otherwise, move to evaluations/earlier/.

    Speeds of an earlier call with the same settings stay, where this one had no images to draw.

    Args:
        path: evaluation.json, or the file of a checkpoint.
        keep: False writes over what a file of the user's choice holds.

    Returns:
        A line that names the earlier figures and their file; None if there were none.
    """
    known, line = _read(path) if keep else {}, None
    if known and _settings(known) == _settings(figures):
        figures = {**figures, **{n: v for n, v in known.items() if n.endswith(SPEED) and n not in figures}}
    elif known:
        place = path.parent / EARLIER / f"{path.stem}-{key_of(_settings(known))[:8]}.json"
        write_json(place, known)
        line = f"{place}: the figures that were there before ({_differing(known, figures)})"
    write_json(path, figures)
    return line


def _read(path: Path) -> dict[str, Any]:
    """The figures in a file; none without one, or in a damaged one, which is written over."""
    with suppress(UserError, *MALFORMED):
        return dict(json.loads(read_text(path, JSON_BYTES))) if path.is_file() else {}
    return {}


def _settings(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures.get(name) for name in SETTINGS}


def _differing(known: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The options of earlier figures, and what else was different."""
    others = [text for name, text in SETTINGS.items() if text and known.get(name) != figures.get(name)]
    return ", ".join([str(known.get(MEASURED_WITH, "of an older version")), *others])
