"""Write the page about runs: one HTML file that needs no network."""

import base64
import gzip
import hashlib
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from ldm_dkdm import __version__
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded, write_text
from ldm_dkdm.model.arguments import path_of
from ldm_dkdm.reports.charts import Chart, Points, places_of, points_of, pool_map, sections_of, unit_of
from ldm_dkdm.reports.images import PageImage
from ldm_dkdm.reports.run_files import RunFiles, read_runs
from ldm_dkdm.reports.tables import Series, thinned
from ldm_dkdm.reports.texts import blocks_of, differences_of, facts_of, names_of, rows_of

REPORT = "report.html"  # file name of the report in a run folder


def write_report(runs: str | Path | Sequence[str | Path], out: str | Path) -> Path:
    """Write one HTML page about run folders, finished or not; it holds all that it shows and loads nothing.

    It shows samples of teacher and student by training step, the curves of metrics.csv and pool.csv, the figures that
    `dkdm evaluate` keeps beside the model, configs and cards. Large grids are made smaller; an image that cannot be
    read is left out with a warning.

    Args:
        runs: a run folder, or several; a folder that is named twice is shown once.
        out: the page.

    Returns:
        The path of the page.

    Raises:
        UserError: no run, a folder that is not a run's, or a damaged table or config in one; nothing is written.
    """
    out = path_of(out, "out")
    runs = [runs] if isinstance(runs, (str, Path)) else runs
    if not runs:
        raise UserError("runs: name at least one run folder")
    paths = list({expanded(run).resolve(): expanded(run) for run in runs}.values())
    write_text(out, page_of(read_runs(paths)))
    return out


def page_of(runs: Sequence[RunFiles]) -> str:
    """The page as HTML."""
    names, unit = names_of([run.path for run in runs]), unit_of(runs)
    points = [points_of(run, unit) for run in runs]
    sections = sections_of(runs, points)
    script, plotly = _resource("page.js"), _plotly()
    return _template().render(
        names=names,
        runs=runs,
        sections=sections,
        places=lambda chart: places_of(chart, points),
        unit=unit,
        timed=any("elapsed" in own for own in points),
        teachers=_teachers(runs),
        facts=rows_of([facts_of(run) for run in runs]),
        figures=rows_of([run.figures.values for run in runs]),
        provenance=rows_of([run.figures.provenance for run in runs]),
        differences=differences_of(runs),
        cards=[blocks_of(run.card) for run in runs],
        data={
            "charts": [_chart(chart, unit) for charts in sections.values() for chart in charts],
            "runs": [_run(*run) for run in zip(names, runs, points)],
        },
        style=_resource("page.css"),
        script=script,
        plotly=plotly,
        hashes=f"{_hash(script)} {plotly['hash']}",
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
    )


def _teachers(runs: Sequence[RunFiles]) -> list[PageImage | None]:
    """The teacher's samples to show beside each run: not the same image twice."""
    seen: set[str | None] = {None}
    shown: list[PageImage | None] = []
    for run in runs:
        uri = run.teacher.uri if run.teacher else None
        shown.append(None if uri in seen else run.teacher)
        seen.add(uri)
    return shown


def _chart(chart: Chart, unit: str) -> dict[str, Any]:
    """A chart for the script, in the order of the page."""
    return {**vars(chart), "y": chart.y.replace("{time}", unit)}


def _run(name: str, run: RunFiles, points: Points) -> dict[str, Any]:
    """What the script draws of a run; its last grid is in the page already."""
    grids = [{"step": grid.step, "uri": None if grid is run.grids[-1] else grid.image.uri} for grid in run.grids]
    lines = {column: _points(series) for column, series in points.items()}
    return {"name": name, "points": lines, "pool": pool_map(run), "grids": grids}


def _points(series: Series) -> dict[str, list[float]]:
    few = thinned(series)
    return {"x": list(few.steps), "y": [float(f"{value:.6g}") for value in few.values]}


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.from_string(_resource("page.html"))


def _resource(name: str) -> str:
    return (files("ldm_dkdm.reports") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """The source expression of a Content-Security-Policy that lets exactly this script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _plotly() -> dict[str, str]:
    """plotly.js (4.8 MB), gzipped to 1.5 MB, in base64; and its hash."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return {"gzip": base64.b64encode(gzip.compress(source.encode(), 6, mtime=0)).decode(), "hash": _hash(source)}
