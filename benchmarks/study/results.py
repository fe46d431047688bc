"""What the runs of the study have shown, as one file."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import HERE, MANY, STUDY, Arm, arms_of

from ldm_dkdm.reports.tables import read_series

RESULTS = HERE / "results.json"
MEASURED = "study.json"  # in the folder of a run
DECIDES = "FD-efficientnet'"  # which figure a claim is about, unless a comparison says otherwise
FAILURES = STUDY / "failed"
CURVE = ("agreement", "agreement_q1", "agreement_q2", "agreement_q3", "agreement_q4")


def write_results(plan: Mapping[str, Any], path: Path = RESULTS) -> Path:
    """Collect the figures of every run that is there, and what failed; what another machine has measured stays."""
    order, found = list(plan["arms"]), read_results(path)
    known = {(row["arm"], row["seed"]): row for row in found["runs"] if row["arm"] in order}
    arms = arms_of(plan)
    names = {arm.teacher_name for arm in arms.values()}
    floors = {name: figures for name, figures in found["teachers"].items() if name in names}
    for arm in arms.values():
        if arm.floor.is_file():
            floors[arm.teacher_name] = figures_in(arm.floor) | figures_in(arm.many_floor)
        for seed in plan["seeds"]:
            if (arm.run(seed) / MEASURED).is_file():
                known[arm.name, seed] = row_of(arm, seed)
    rows = sorted(known.values(), key=lambda row: (order.index(row["arm"]), row["seed"]))
    files = sorted(file for file in FAILURES.rglob("*") if file.is_file())
    failed = {str(file.relative_to(FAILURES)).removesuffix(".txt"): file.read_text() for file in files}
    path.write_text(json.dumps({"teachers": floors, "runs": rows, "failed": failed}, indent=1) + "\n")
    return path


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """`teachers`: figures of each teacher beside itself; `runs`: arm, seed, overrides, figures, calls, seconds,
    curves of each; `failed`: reasons by task.
    """
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {"teachers": {}, "runs": [], "failed": {}, **found}


def measured_runs(plan: Mapping[str, Any], path: Path = RESULTS) -> set[tuple[str, int]]:
    """Arms and seeds whose runs have been measured, on any machine, and whose settings the plan has not changed since.

    A setting that only one of both names does not count: the plan may name what was a default, or leave one out.
    """
    arms, many = arms_of(plan), f"{DECIDES} (many)"
    found = [row for row in read_results(path)["runs"] if row["arm"] in arms]
    complete = [row for row in found if row["arm"] not in plan["many"]["arms"] or many in row["figures"]]
    return {(row["arm"], row["seed"]) for row in complete if _agrees(row["overrides"], arms[row["arm"]].overrides)}


def _agrees(made: Mapping[str, Any], planned: Mapping[str, Any]) -> bool:
    return all(made[key] == planned[key] for key in made.keys() & planned.keys())


def row_of(arm: Arm, seed: int) -> dict[str, Any]:
    """One run that has been measured."""
    run = arm.run(seed)
    series = read_series([run / "metrics.csv"])
    curves = {name: list(zip(series[name].steps, series[name].values)) for name in CURVE if name in series}
    own = {"arm": arm.name, "seed": seed, "overrides": dict(arm.overrides)}
    measured = json.loads((run / MEASURED).read_text())
    measured["figures"] |= figures_in(run / MANY)
    return {**own, **measured, "seconds": round(series["seconds"].values[-1]), "curves": curves}


def figures_in(file: Path) -> dict[str, Any]:
    """The figures of one measurement; empty without its file."""
    return dict(json.loads(file.read_text())["figures"]) if file.is_file() else {}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the seeds' figures."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")
