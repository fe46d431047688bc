"""Read what a page shows out of a run folder. Nothing in it is run, and nothing is written."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm_dkdm.config.load import RUN_KIND, card_kind, read_yaml
from ldm_dkdm.config.schema import FirstStageCard, ModelCard
from ldm_dkdm.errors import UserError, blaming
from ldm_dkdm.reporting import decoration
from ldm_dkdm.reports.pictures import Picture, picture
from ldm_dkdm.reports.tables import Series, read_series, spread

MAX_GRIDS = 24  # grids of a run in the page
MIN_CURVE = 4  # values of a dict with numbers as keys that are shown as a curve
FIGURES, CARD, TEACHER = "evaluation.json", "README.md", "teacher.png"
_GRID = re.compile(r"step=(\d+)\.png")
_OLD_METRICS = re.compile(r"metrics(?:-from-(\d+))?")


@dataclass(frozen=True)
class Grid:
    """Samples of a student at a training step."""

    step: int
    image: Picture


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder.

    Attributes:
        path: the folder. config: its config.yaml as text.
        keys: dotted key of the config -> value.
        series: column -> points by training step, of metrics.csv and pool.csv.
        figures: evaluation.json, name -> text. curves: name -> points, of its mappings from numbers to numbers.
        card: README.md of the model folder; empty without one.
        grids: samples, by step. grid_count: how many the folder holds.
        teacher: the teacher's samples from the same noise.
    """

    path: Path
    config: str
    keys: Mapping[str, Any]
    series: Mapping[str, Series]
    figures: Mapping[str, str]
    curves: Mapping[str, Series]
    card: str
    grids: Sequence[Grid]
    grid_count: int
    teacher: Picture | None


def read_run(path: Path) -> RunFiles:
    """Read a run folder, finished or not; an image that cannot be read is logged and left out.

    Raises:
        UserError: not a run folder, or a damaged table or config.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{path}: not a run folder (it has no config.yaml)")
    if (kind := card_kind(file)) in (ModelCard.KIND, FirstStageCard.KIND):
        raise UserError(f"{path}: is {kind}; name the run folder that it is in")
    if kind != RUN_KIND:
        raise UserError(f"{path}: its config.yaml is not a run's")
    figures, curves = _figures(path)
    found = sorted((int(m[1]), f) for f in (path / "samples").glob("step=*.png") if (m := _GRID.fullmatch(f.name)))
    images = [(found[i][0], _image(found[i][1])) for i in spread(len(found), MAX_GRIDS)]
    return RunFiles(
        path=path,
        config=file.read_text(encoding="utf-8-sig"),
        keys=dict(flat(OmegaConf.to_container(read_yaml(file), resolve=False), ".")),
        series={**read_series(metrics_files(path)), **_optional(path / "pool.csv")},
        figures=figures,
        curves=curves,
        card=_card(path),
        grids=[Grid(step, image) for step, image in images if image],
        grid_count=len(found),
        teacher=_image(path / "samples" / TEACHER),
    )


def metrics_files(path: Path) -> list[Path]:
    """The tables of a run's training, oldest first: metrics.csv, before it the folders of older versions."""
    old = sorted((int(m[1] or 0), f) for f in path.glob("metrics*") if (m := _OLD_METRICS.fullmatch(f.name)))
    return [f for f in [*(folder / "metrics.csv" for _, folder in old), path / "metrics.csv"] if f.is_file()]


def _optional(file: Path) -> dict[str, Series]:
    return read_series([file]) if file.is_file() else {}


def _image(file: Path) -> Picture | None:
    if file.is_file():
        with decoration(str(file)):
            return picture(file)
    return None


def _in_model(path: Path, name: str) -> Path | None:
    """A file in the model folder of a run."""
    kinds = (ModelCard.KIND, FirstStageCard.KIND)
    homes = [f.parent for f in sorted(path.glob("*/config.yaml")) if card_kind(f) in kinds]
    return next((home / name for home in homes if (home / name).is_file()), None)


def _card(path: Path) -> str:
    file = _in_model(path, CARD)
    return file.read_text(encoding="utf-8", errors="replace") if file else ""


def _figures(path: Path) -> tuple[dict[str, str], dict[str, Series]]:
    """evaluation.json as text by name, and its curves: long mappings from numbers to numbers."""
    file = _in_model(path, FIGURES)
    if file is None:
        return {}, {}
    with blaming(file):
        tree = json.loads(file.read_text(encoding="utf-8"))
        curves = {name: value for name, value in flat(tree) if isinstance(value, Mapping)}
    series = {name: Series([int(t) for t in curve], list(curve.values())) for name, curve in curves.items()}
    return {name.replace("_", " "): shown(value) for name, value in flat(tree) if name not in curves}, series


def flat(tree: Any, mark: str = " · ", name: str = "") -> list[tuple[str, Any]]:
    """(name, value) of the leaves of a tree of mappings; lists of mappings are numbered, curves are leaves."""
    if isinstance(tree, Mapping) and tree and not _is_curve(tree):
        parts = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        parts = list(enumerate(tree, 1))
    else:
        return [(name, tree)]
    return [leaf for key, value in parts for leaf in flat(value, mark, f"{name}{mark}{key}" if name else str(key))]


def _is_curve(tree: Mapping[Any, Any]) -> bool:
    numbers = all(isinstance(value, (int, float)) for value in tree.values())
    return numbers and len(tree) >= MIN_CURVE and all(str(key).isdecimal() for key in tree)


def shown(value: Any) -> str:
    """A leaf as text: numbers to six digits, lists joined by commas."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
