"""The charts of a page, by section, and the figures that they need and no file holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm_dkdm.reports.run_files import RunFiles
from ldm_dkdm.reports.tables import Series, spread

POOL_BINS = 20  # columns t_00 ... t_19 of pool.csv
STEP = "training step"
MAP = "t_00"  # the line of the chart that shows all of them
MAX_COLUMNS = 200  # training steps in that chart


@dataclass(frozen=True)
class Chart:
    """A chart of one or more columns of every run.

    Attributes:
        title: above it. y: title of its y axis. x: title of its x axis.
        lines: column -> its name in the legend.
        log: whether the y axis is logarithmic, where all values are above 0.
        alone: whether every run has a chart of its own.
    """

    title: str
    y: str
    lines: Mapping[str, str]
    log: bool = False
    x: str = STEP
    alone: bool = False


def _error(column: str, title: str) -> Chart:
    return Chart(title, "mean squared error of eps", {column: ""}, log=True)


QUARTERS = ("0 to T/4", "T/4 to T/2", "T/2 to 3T/4", "3T/4 to T")
SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Loss": (
        Chart("Loss", "loss", {"loss": ""}, log=True),
        _error("eps_mse", "eps error in training batches"),
        Chart("L'vlb", "L'vlb", {"vlb": ""}, log=True),
        Chart("Learning rate", "learning rate", {"learning_rate": ""}),
    ),
    "Agreement with the teacher": (
        _error("agreement", "eps error on held-out chains of the teacher"),
        *(_error(f"agreement_q{i}", f"eps error, t from {span}") for i, span in enumerate(QUARTERS, 1)),
        Chart("Difference of x_0 along the DDIM chain", "mean squared difference", {"x0_drift": ""}, log=True),
        Chart("PSNR of samples from the same noise", "dB", {"psnr": ""}),
        Chart("SSIM of samples from the same noise", "SSIM", {"ssim": ""}),
    ),
    "Pool": (
        Chart("Timesteps in the pool", "t / T", {MAP: ""}, alone=True),
        Chart(
            "Age of the pool's slots",
            "training steps",
            {"age_mean": "mean", "age_p50": "median", "age_p90": "90%", "age_max": "oldest"},
            alone=True,
        ),
    ),
    "Speed": (
        Chart("Steps per second", "steps / s", {"steps_per_second": ""}),
        Chart("Training time", "{time}", {"elapsed": ""}),
        Chart("Time left, as it was expected at each step", "{time}", {"left": ""}),
    ),
}
OTHERS, CURVES = "Other columns", "Figures as curves"
Points = Mapping[str, Series]  # a run's lines, by column
UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}  # seconds in each unit, the longest first


def sections_of(runs: Sequence[RunFiles], points: Sequence[Points]) -> dict[str, list[Chart]]:
    """The charts for which a run has points (`points_of`), by section; columns that no chart names get one each."""
    present = dict.fromkeys(column for own in points for column in own)
    curves = dict.fromkeys(name for run in runs for name in run.figures.curves)
    found = {title: [c for c in charts if not present.keys().isdisjoint(c.lines)] for title, charts in SECTIONS.items()}
    known = {"seconds", *(bin_name(i) for i in range(POOL_BINS)), *curves}
    known |= {column for charts in SECTIONS.values() for chart in charts for column in chart.lines}
    found[OTHERS] = [Chart(name, name, {name: ""}) for name in present if name not in known]
    found[CURVES] = [Chart(name, "", {name: ""}, log=True, x=name.rpartition("_by_")[2]) for name in curves]
    return {title: charts for title, charts in found.items() if charts}


def places_of(chart: Chart, points: Sequence[Points]) -> list[int]:
    """The runs that have this chart to themselves, by their index; for a chart of all runs the first."""
    return [i for i, own in enumerate(points) if not own.keys().isdisjoint(chart.lines)] if chart.alone else [0]


def bin_name(i: int) -> str:
    """The column of pool.csv with the slots whose t is in [i/20, (i+1)/20) T."""
    return f"t_{i:02d}"


def points_of(run: RunFiles, unit: str) -> Points:
    """The points of all lines of a run by column, times in a unit of UNITS."""
    found = {**run.series, **run.figures.curves}
    divisor = UNITS[unit]
    for column, series in (("elapsed", run.series.get("seconds")), ("left", time_left(run))):
        if series is not None and series.steps:
            found[column] = Series(series.steps, [value / divisor for value in series.values])
    return found


def time_left(run: RunFiles) -> Series | None:
    """Seconds to the end of a run, as its speed at each step says; to `trainer.max_minutes` if that comes first."""
    speed, spent = run.series.get("steps_per_second"), run.series.get("seconds")
    last, minutes = run.keys.get("trainer.max_steps"), run.keys.get("trainer.max_minutes")
    if speed is None or not isinstance(last, int):
        return None
    points = [(step, (last - step) / rate) for step, rate in zip(speed.steps, speed.values) if rate > 0]
    if spent is not None and isinstance(minutes, (int, float)):
        used = dict(zip(spent.steps, spent.values))
        points = [(step, min(left, 60 * minutes - used.get(step, 0.0))) for step, left in points]
    return Series([step for step, _ in points], [max(0.0, left) for _, left in points])


def unit_of(runs: Sequence[RunFiles]) -> str:
    """The unit in which the longest time of the runs is easiest to read."""
    times = [run.series.get("seconds") for run in runs] + [time_left(run) for run in runs]
    longest = max((max(series.values, default=0.0) for series in times if series is not None), default=0.0)
    return next((name for name, size in UNITS.items() if longest >= 2 * size), "seconds")


def pool_map(run: RunFiles) -> dict[str, Any] | None:
    """Share of the pool's slots in each bin of t: `x` steps, `y` t/T, `z` a row per bin; None without pool.csv."""
    columns = [run.series.get(bin_name(i)) for i in range(POOL_BINS)]
    if any(column is None for column in columns):
        return None
    counts = [dict(zip(column.steps, column.values)) for column in columns if column is not None]
    shared = [step for step in counts[0] if all(step in column for column in counts)]
    steps = [shared[i] for i in spread(len(shared), MAX_COLUMNS)]
    totals = {step: sum(column[step] for column in counts) or 1.0 for step in steps}
    shares = [[round(column[step] / totals[step], 5) for step in steps] for column in counts]
    return {"x": steps, "y": [(i + 0.5) / POOL_BINS for i in range(POOL_BINS)], "z": shares}
