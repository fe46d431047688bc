"""How figures of many runs go together: rank correlations, and students against their teachers."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import ROOT, Arm, arms_in
from results import DECIDES, spread

FIGURES = (
    "agreement",
    "agreement_q1",
    "agreement_q2",
    "agreement_q3",
    "agreement_q4",
    "x0_drift",
    "psnr",
    "ssim",
    "pixel Frechet'",
    "KID-efficientnet'",
)
TO_DATA = "FD-efficientnet"
LARGE = 9.5  # a deviation that has two digits before its point
LEAST = 5  # runs in a rank correlation

SPEARMAN = f"""Spearman's rank correlation with {DECIDES}, over all runs that have the same teacher, whatever
they compare. The agreement needs no images; the distances are of the same samples as the one that decides."""

Row = Mapping[str, Any]


def ranks(rows: Mapping[str, Sequence[Row]], arms: Mapping[str, Arm]) -> str:
    """Spearman's rank correlations of each figure with the deciding one, over all runs of one teacher."""
    by_teacher: dict[str, list[Mapping[str, float]]] = {}
    for name, own in rows.items():
        by_teacher.setdefault(arms[name].teacher, []).extend(row["figures"] for row in own)
    shown = {teacher: found for teacher, found in by_teacher.items() if len(found) >= LEAST}
    if not shown:
        return ""
    head = " | ".join(f"students of `{Path(teacher).name}` ({len(found)} runs)" for teacher, found in shown.items())
    lines = [f"| figure | {head} |", "|---" * (len(shown) + 1) + "|"]
    for figure in (*FIGURES, TO_DATA):
        cells = []
        for found in shown.values():
            cells.append(correlation([(row[figure], row[DECIDES]) for row in found if figure in row]))
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(["## Which figure ranks students as the deciding one does", "", SPEARMAN, "", *lines, ""])


def correlation(pairs: Sequence[tuple[float, float]]) -> str:
    """A rank correlation; empty with too few runs, or where one figure is always the same."""
    from scipy.stats import spearmanr

    if len(pairs) < LEAST or min(len(set(values)) for values in zip(*pairs)) < 2:
        return ""
    return f"{spearmanr(*zip(*pairs)).statistic:.2f}"


def teacher_points(
    comparison: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], arms: Mapping[str, Arm], floors: Mapping[str, Row]
) -> list[tuple[float, float]]:
    """Distances to the data: a teacher's, and a student's of it, for every run of a comparison."""
    found = []
    for name in arms_in(comparison):
        teacher = floors.get(arms[name].teacher_name, {}).get(TO_DATA)
        if teacher is not None:
            found += [(teacher, row["figures"][TO_DATA]) for row in rows.get(name, ())]
    return found


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope, intercept and correlation of students' distances against teachers', by least squares (Fig. 10).

    Raises:
        statistics.StatisticsError: fewer than two different teachers.
    """
    x, y = zip(*points)
    line = statistics.linear_regression(x, y)
    return line.slope, line.intercept, statistics.correlation(x, y)


def fitted(points: Sequence[tuple[float, float]]) -> str:
    """The fit in words; empty where there are fewer than two teachers."""
    teachers = {x for x, _ in points}
    if len(teachers) < 2:
        return ""
    slope, intercept, correlation = fit(points)
    return (
        f"Linear fit over {len(points)} students of {len(teachers)} teachers, distances to the data: "
        f"student = {slope:.2f} x teacher + {intercept:.1f}, correlation {correlation:.3f}.\n"
    )


def draw_fit(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Students against their teachers, and the line."""
    x, y = zip(*points)
    slope, intercept, _ = fit(points)
    ends = [min(x), max(x)]
    axes.plot(x, y, "o", color="#20406a", label="students")
    axes.plot(ends, [slope * end + intercept for end in ends], color="#9db8d8", label="least squares")
    axes.plot(ends, ends, ":", color="grey", label="as good as its teacher")


def equal_time(comparison: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> str:
    """The agreement of each arm after as many steps as take equal time, by steps timed in turn on a quiet machine."""
    speeds = comparison.get("speeds")
    file = ROOT / speeds["file"] if speeds else None
    if file is None or not file.is_file():
        return ""
    rates = {row["lever"]: row["ratio"] for row in json.loads(file.read_text())["rows"]}
    made = [arm for arm in arms_in(comparison) if rows.get(arm)]
    fastest = max(rates[speeds["levers"][arm]] for arm in made)
    lines = ["| arm | samples/s | steps | agreement |", "|---|---|---|---|"]
    for arm in made:
        rate = rates[speeds["levers"][arm]]
        steps = min(row["curves"]["agreement"][-1][0] for row in rows[arm]) * rate / fastest
        found = [curve_at(row["curves"]["agreement"], steps) for row in rows[arm]]
        lines.append(f"| `{arm}` | {rate:.2f} | {steps:.0f} | {cell(found)} |")
    return "\n".join(["The agreement during the training, at equal time:", "", *lines, ""])


def curve_at(curve: Sequence[Sequence[float]], step: float) -> float:
    """A curve's value between two of its steps, straight in the logarithm."""
    after = next(i for i, (known, _) in enumerate(curve) if known >= step)
    if after == 0:
        return curve[0][1]
    (first, low), (second, high) = curve[after - 1], curve[after]
    share = (step - first) / (second - first)
    return math.exp((1 - share) * math.log(low) + share * math.log(high))


def cell(values: Sequence[float]) -> str:
    """Mean and deviation of the seeds' figures; empty without any."""
    if not values:
        return ""
    mean, deviation = spread(values)
    if math.isnan(deviation):
        return f"{mean:.3g}"
    return f"{mean:.3g} ± {deviation:.0f}" if deviation >= LARGE else f"{mean:.3g} ± {deviation:.1g}"
