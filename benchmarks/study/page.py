"""Write docs/evidence.md and its plots from results.json: python benchmarks/study/page.py"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from plan import HERE, LOADER, ROOT, arms_in, arms_of, read_plan
from relations import cell, draw_fit, equal_time, fitted, ranks, teacher_points
from results import DECIDES, read_results, spread

sys.path.insert(0, str(ROOT / "benchmarks"))
from common import plot

PAGE = ROOT / "docs" / "evidence.md"
FINDINGS = HERE / "findings.yaml"  # what the runs of a comparison have shown, in words
PLOTS = ROOT / "docs" / "evidence"
COLUMNS = {
    DECIDES: DECIDES,
    "FD-efficientnet' (many)": "FD' by many",
    "FD-efficientnet": "FD to the data",
    "KID-efficientnet'": "KID'",
    "KID-efficientnet' (many)": "KID' by many",
    "pixel Frechet'": "pixel Frechet'",
    "agreement": "agreement",
    "agreement_q1": "q1",
    "agreement_q2": "q2",
    "agreement_q3": "q3",
    "agreement_q4": "q4",
}
HEAD = """# Evidence

This page is written by `python benchmarks/study/page.py` from `benchmarks/study/results.json`. The plan, with what was
decided before the first run, is `benchmarks/study/plan.yaml`. `make study` makes the runs that are missing.

All tables compare runs of equal student steps, but `batch128`, which makes half the steps with as many samples, those
of changes together, and the changes to the quickstart, which are of about equal time. Each cell is the mean over
seeds ± their standard deviation. The ratio is of the deciding figure to that of the first arm of the group; it is
**bold** where the means differ by more than both deviations together. A prime marks a distance to the samples of the
arm's own teacher; q1 to q4 are the quarters of t from 0 to T. Calls of the teacher are in thousands of samples: the
training, and what prepares it (a pool, or images), which arms share where they can. A teacher to itself is its
samples with other seeds: the distance that is left of a perfect student with so few samples. Minutes are of the
training on one thread, beside other runs: no measure of speed.
"""

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def main() -> None:
    """Write the page and the plots."""
    plan, results = read_plan(), read_results()
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["runs"]:
        rows.setdefault(row["arm"], []).append(row)
    parts = [HEAD, overview(plan, results)]
    for name, comparison in plan["comparisons"].items():
        if made(comparison, rows):
            parts.append(section(name, comparison, rows, results["teachers"]))
            if comparison.get("fit"):
                parts.append(fit_section(name, comparison, rows, results["teachers"]))
    parts += [ranks(rows, arms_of(plan)), grids(plan, rows)]
    PAGE.write_text("\n".join(part for part in parts if part))
    print(PAGE)


def overview(plan: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """How many runs there are, and which failed."""
    runs, planned = results["runs"], len(plan["arms"]) * len(plan["seeds"])
    hours = sum(row["seconds"] for row in runs) / 3600
    made = f"{len(runs)} of {planned} planned runs are made, {hours:.1f} hours on one thread each."
    measured = plan["measured"]
    sizes = f"Figures are of {measured['count']:,} samples each by DDIM in {measured['steps']} steps"
    sizes += f", those 'by many' of {plan['many']['count']:,}."
    failed = [f"- failed: `{name}`: {reason}" for name, reason in results["failed"].items()]
    return "\n".join([f"{made} {sizes}", *failed, ""])


def section(name: str, comparison: Mapping[str, Any], rows: Rows, floors: Mapping[str, Mapping[str, float]]) -> str:
    """Title, claim, table and plots of a comparison; above each pair's first arm its teacher beside itself.

    Arms whose runs lack the figure that decides are named as not run yet.
    """
    decides, arms = comparison.get("decides", DECIDES), made(comparison, rows)
    shown = [column for column in COLUMNS if any(figures(rows[arm], column) for arm in arms)]
    lines = ["| arm | seeds | M | calls | minutes | " + " | ".join(COLUMNS[column] for column in shown) + " | ratio |"]
    lines.append("|---" * (len(shown) + 6) + "|")
    seen, known = set[str](), arms_of(read_plan())
    for group in comparison["groups"]:
        own = [arm for arm in group if arm in arms]
        pair = group[0].partition("/")[0]
        teachers = {rows[arm][0]["overrides"].get("teacher.ckpt", known[arm].pair["teacher"]) for arm in own}
        if len(teachers) == 1 and pair in floors and pair not in seen:
            seen.add(pair)
            cells = [cell([floors[pair][column]]) if column in floors[pair] else "" for column in shown]
            lines.append(f"| teacher of `{pair}` to itself | | | | | {' | '.join(cells)} | |")
        lines += [table_row(arm, group[0], rows, shown, decides) for arm in own]
    found = [f"## {comparison['title']}", ""]
    found += [f"Claim: {comparison['claim']}.", ""] if "claim" in comparison else []
    found += [f"Found: {' '.join(findings()[name].split())}", ""] if name in findings() else []
    timed = equal_time(comparison, rows)
    found += [*lines, "", *([timed] if timed else [])]
    missing = [arm for arm in arms_in(comparison) if arm not in arms]
    found += ["Not run yet: " + ", ".join(f"`{arm}`" for arm in missing) + ".", ""] if missing else []
    draw_bars(arms, rows, PLOTS / f"{name}.png", comparison["title"], decides)
    found += [f"![{comparison['title']}](evidence/{name}.png)", ""]
    if comparison.get("curves"):
        draw_curves(arms, rows, PLOTS / f"{name}-curves.png", comparison["title"])
        found += [f"![{comparison['title']}, agreement during the training](evidence/{name}-curves.png)", ""]
    return "\n".join(found)


def made(comparison: Mapping[str, Any], rows: Rows) -> list[str]:
    """The arms of a comparison of which there is the figure that decides."""
    decides = comparison.get("decides", DECIDES)
    return [arm for arm in arms_in(comparison) if figures(rows.get(arm, ()), decides)]


def findings() -> dict[str, str]:
    """What was found, by comparison; written when its runs are there."""
    return yaml.load(FINDINGS.read_text(), LOADER) or {}


def fit_section(name: str, comparison: Mapping[str, Any], rows: Rows, floors: Mapping[str, Mapping[str, float]]) -> str:
    """Students against their teachers, in words and as a plot; empty before there are two teachers."""
    points = teacher_points(comparison, rows, arms_of(read_plan()), floors)
    if not fitted(points):
        return ""
    title = "students and teachers, distances to the data"
    plot(PLOTS / f"{name}-fit.png", lambda axes: draw_fit(axes, points), "teacher", "student", title)
    return f"{fitted(points)}\n![{title}](evidence/{name}-fit.png)\n"


def grids(plan: Mapping[str, Any], rows: Rows) -> str:
    """The images of grids.py whose runs are made; empty without any."""
    found = []
    for pair, arms in plan["grids"].items():
        if all(any(row["seed"] == 0 for row in rows.get(arm, ())) for arm in arms):
            found += [f"![teacher and students of {pair}](evidence/grid-{pair}.png)", ""]
    head = "Images of seed 0's students from the same noise, DDIM in 50 steps (Fig. 11 to 15): not chosen."
    return "\n".join(["## Samples", "", head, "", *found]) if found else ""


def table_row(arm: str, first: str, rows: Rows, shown: Sequence[str], decides: str) -> str:
    """One arm."""
    own = rows[arm]
    calls = " + ".join(f"{count / 1000:,.0f}" for count in own[0]["calls"].values())
    minutes = sum(row["seconds"] for row in own) / len(own) / 60
    cells = [f"`{arm}`", str(len(own)), f"{own[0]['parameters'] / 1e6:.2f}", calls, f"{minutes:.1f}"]
    cells += [cell(figures(own, column)) for column in shown]
    values = figures(own, decides)
    return "| " + " | ".join([*cells, ratio(values, figures(rows.get(first, ()), decides))]) + " |"


def figures(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A figure of all seeds."""
    return [row["figures"][name] for row in rows if name in row.get("figures", {})]


def ratio(own: Sequence[float], first: Sequence[float]) -> str:
    """Ratio of means, marked where the difference is beyond both deviations."""
    if not first:
        return ""
    (mean, deviation), (other, others) = spread(own), spread(first)
    beyond = abs(mean - other) > deviation + others  # never with one seed: the deviation is not a number
    return f"**{mean / other:.2f}**" if beyond else f"{mean / other:.2f}"


def draw_bars(arms: Sequence[str], rows: Rows, path: Path, title: str, decides: str) -> None:
    """The deciding figure of each arm: bars of means, a point for each seed."""

    def bars(axes: Any) -> None:
        for place, arm in enumerate(arms):
            values = figures(rows[arm], decides)
            axes.bar(place, spread(values)[0], 0.6, color="#9db8d8")
            axes.plot([place] * len(values), values, "o", color="#20406a", markersize=4)
        axes.set_xticks(range(len(arms)), [arm.partition("/")[2] for arm in arms], rotation=30, ha="right")

    path.parent.mkdir(exist_ok=True)
    plot(path, bars, "", COLUMNS[decides], title)


def draw_curves(arms: Sequence[str], rows: Rows, path: Path, title: str) -> None:
    """The agreement during the training: mean over seeds, and a band from the lowest to the highest."""

    def curves(axes: Any) -> None:
        for arm in arms:
            found = [dict(row["curves"]["agreement"]) for row in rows[arm] if row.get("curves", {}).get("agreement")]
            steps = sorted(set.intersection(*map(set, found))) if found else []
            if steps:
                values = [[curve[step] for curve in found] for step in steps]
                (line,) = axes.plot(steps, [sum(v) / len(v) for v in values], label=arm.partition("/")[2])
                band = [min(v) for v in values], [max(v) for v in values]
                axes.fill_between(steps, *band, alpha=0.15, color=line.get_color())
        axes.set_yscale("log")
        axes.legend(fontsize="small")

    plot(path, curves, "training step", "agreement", f"{title}: agreement")


if __name__ == "__main__":
    main()
