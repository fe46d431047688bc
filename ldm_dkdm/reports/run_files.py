"""Read what a page shows out of a run folder. Nothing in it is run, and nothing is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm_dkdm.config.load import RUN_KIND, card_kind, read_yaml
from ldm_dkdm.config.schema import FirstStageCard, ModelCard
from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import decoration
from ldm_dkdm.reports.images import PageImage, page_image
from ldm_dkdm.reports.model_figures import ModelFigures, flat, read_figures
from ldm_dkdm.reports.tables import Series, read_series, spread

MAX_GRIDS = 24  # grids of a run in the page
MAX_NAMES = 8  # runs that a message names
CARD, TEACHER = "README.md", "teacher.png"
_GRID = re.compile(r"step=(\d+)\.png")
_OLD_METRICS = re.compile(r"metrics(?:-from-(\d+))?")


@dataclass(frozen=True)
class Grid:
    """Samples of a student at a training step."""

    step: int
    image: PageImage


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder.

    Attributes:
        path: the folder. saved_step: training step of its model, 0 without one. config: its config.yaml as text.
        keys: dotted key of the config -> value.
        series: column -> points by training step, of metrics.csv and pool.csv.
        figures: of its model, named as beside the runs that were read with it.
        card: README.md of the model folder; empty without one.
        grids: samples, by step. grid_count: how many the folder holds.
        teacher: the teacher's samples from the same noise.
    """

    path: Path
    saved_step: int
    config: str
    keys: Mapping[str, Any]
    series: Mapping[str, Series]
    figures: ModelFigures
    card: str
    grids: Sequence[Grid]
    grid_count: int
    teacher: PageImage | None


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read run folders, finished or not; an image that cannot be read is logged and left out.

    Raises:
        UserError: not a run folder, or a damaged table or config.
    """
    for path in paths:
        _require_run(path)
    models = [_model_folder(path) for path in paths]
    return [_read(*own) for own in zip(paths, models, read_figures(models), strict=True)]


def _require_run(path: Path) -> None:
    file = path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{path}: not a run folder (it has no config.yaml){_runs_in(path)}")
    if (kind := card_kind(file)) in (ModelCard.KIND, FirstStageCard.KIND):
        raise UserError(f"{path}: is {kind}; name the run folder that it is in")
    if kind != RUN_KIND:
        raise UserError(f"{path}: its config.yaml is not a run's")


def _runs_in(path: Path) -> str:
    """Advice that names the runs in a folder, the newest first; empty where it holds none."""
    runs = [file.parent for file in path.glob("*/config.yaml") if file.is_file() and _is_run(file)]
    names = [str(run) for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True)]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"; it holds the runs {', '.join(names[:MAX_NAMES])}{more}: name one or several of them" if names else ""


def _is_run(config: Path) -> bool:
    try:
        return card_kind(config) == RUN_KIND
    except UserError:  # a damaged file
        return False


def _read(path: Path, model: Path | None, figures: ModelFigures) -> RunFiles:
    file = path / "config.yaml"
    found = sorted((int(m[1]), f) for f in (path / "samples").glob("step=*.png") if (m := _GRID.fullmatch(f.name)))
    images = [(found[i][0], _image(found[i][1])) for i in spread(len(found), MAX_GRIDS)]
    return RunFiles(
        path=path,
        saved_step=_saved_step(model),
        config=file.read_text(encoding="utf-8-sig"),
        keys=_keys(file),
        series={**read_series(metrics_files(path)), **_optional(path / "pool.csv")},
        figures=figures,
        card=_card(model),
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


def _image(file: Path) -> PageImage | None:
    if file.is_file():
        with decoration(str(file)):
            return page_image(file)
    return None


def _model_folder(path: Path) -> Path | None:
    kinds = (ModelCard.KIND, FirstStageCard.KIND)
    return next((f.parent for f in sorted(path.glob("*/config.yaml")) if card_kind(f) in kinds), None)


def _keys(config: Path) -> dict[str, Any]:
    """Dotted key -> value; `${...}` stays as it is written."""
    return dict(flat(OmegaConf.to_container(read_yaml(config), resolve=False), "."))


def _saved_step(model: Path | None) -> int:
    """The step in the facts of a model folder."""
    step = _keys(model / "config.yaml").get("info.step") if model else None
    return step if isinstance(step, int) else 0


def _card(model: Path | None) -> str:
    file = model / CARD if model else None
    return file.read_text(encoding="utf-8", errors="replace") if file and file.is_file() else ""
