"""Read the figures of a run's model: evaluation.json and evaluations/*.json in its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_dkdm.checkpoints.card import FIGURES, RECORDS
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.files import JSON_BYTES, read_text
from ldm_dkdm.reports.figure_labels import MARK, labels_of, settings_of
from ldm_dkdm.reports.tables import Series

MIN_CURVE = 4  # values of a mapping from numbers to numbers that is a curve
OF_NETWORKS = ("_parameters", "_gflops")  # ends of the names of figures that no setting changes


@dataclass
class ModelFigures:
    """What was measured of a model.

    Attributes:
        values: name -> text. provenance: name -> text, of what was compared and how.
        curves: name -> points, of mappings from numbers to numbers.
    """

    values: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Series] = field(default_factory=dict)

    def add(self, tree: Any, prefix: str = "") -> None:
        """Take the leaves of a tree; of a record, `figures` are values and all else is provenance, else texts are."""
        is_record = isinstance(tree, Mapping) and isinstance(tree.get("figures"), Mapping)
        values = tree["figures"] if is_record else tree
        others = {key: value for key, value in tree.items() if key != "figures"} if is_record else {}
        for key, own in values.items():
            for name, value in flat({key: own}, MARK, "" if key.endswith(OF_NETWORKS) else prefix):
                if isinstance(value, Mapping) and value:
                    points = {int(key): number for key, number in value.items() if math.isfinite(number)}
                    self.curves[name] = Series(list(points), list(points.values()))
                else:
                    place = self.values if is_record or not _has_text(value) else self.provenance
                    place[name.replace("_", " ")] = shown(value)
        for name, value in flat(others, MARK, prefix) if others else []:
            self.provenance[name.replace("_", " ")] = shown(value)


def read_figures(models: Sequence[Path | None]) -> list[ModelFigures]:
    """The figures in model folders that are shown side by side; none without a folder.

    Figures of one reference have one name in all of them where they were measured with the same settings; otherwise
    what differs is in the name.

    Raises:
        UserError: a damaged file.
    """
    files = [[] if model is None else _files(model) for model in models]
    labels = labels_of([[(_name(file), settings_of(tree)) for file, tree in own] for own in files])
    found = []
    for own, names in zip(files, labels, strict=True):
        figures, used = ModelFigures(), set[str]()
        for (file, tree), label in zip(own, names, strict=True):
            figures.add(tree, file.stem if label in used else label)
            used.add(label)
        found.append(figures)
    return found


def _files(model: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """The files of figures in a model folder, and their content."""
    found = []
    for file in [model / FIGURES, *sorted((model / RECORDS).glob("*.json"))]:
        if not file.is_file():
            continue
        with blaming(file):
            tree = json.loads(read_text(file, JSON_BYTES))
            if not isinstance(tree, Mapping):
                raise UserError(f"{file}: is not a file of figures")
            found.append((file, tree))
    return found


def _name(file: Path) -> str:
    """The reference of a file's figures: its name without the hash; evaluation.json has none."""
    return "" if file.name == FIGURES else file.stem.rpartition("-")[0] or file.stem


def flat(tree: Any, mark: str, name: str = "") -> list[tuple[str, Any]]:
    """(name, value) of the leaves of a tree of mappings; lists of mappings are numbered, curves are leaves."""
    if isinstance(tree, Mapping) and tree and not _is_curve(tree):
        parts = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        parts = list(enumerate(tree, 1)) if len(tree) > 1 else [("", tree[0])]
    else:
        return [(name, tree)]
    return [leaf for key, value in parts for leaf in flat(value, mark, mark.join(filter(None, (name, str(key)))))]


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and any(isinstance(item, str) for item in value))


def _is_curve(tree: Mapping[Any, Any]) -> bool:
    numbers = all(isinstance(value, (int, float)) for value in tree.values())
    return numbers and len(tree) >= MIN_CURVE and all(str(key).isdecimal() for key in tree)


def shown(value: Any) -> str:
    """A leaf as text: numbers to six digits, lists joined by commas, true and false as in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None or value == {} else str(value)
