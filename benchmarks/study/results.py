"""What the runs of the study have shown, as one file."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import HERE, STUDY, Arm, arms_of

from ldm_dkdm.reports.tables import read_series

RESULTS = HERE / "results.json"
CURVE = ("agreement", "agreement_q1", "agreement_q2", "agreement_q3", "agreement_q4")


def write_results(plan: Mapping[str, Any], path: Path = RESULTS) -> Path:
    """Collect the figures of every run that is there; what another machine has measured stays."""
    known = {(row["arm"], row["seed"]): row for row in read_results(path)}
    for arm in arms_of(plan).values():
        for seed in plan["seeds"]:
            row = row_of(arm, seed)
            if row is not None:
                known[arm.name, seed] = row
    order = list(plan["arms"])
    kept = [row for row in known.values() if row["arm"] in order]
    rows = sorted(kept, key=lambda row: (order.index(row["arm"]), row["seed"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return path


def read_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of a file of results: arm, seed, overrides, figures, calls, seconds, curves."""
    return json.loads(path.read_text()) if path.is_file() else []


def row_of(arm: Arm, seed: int) -> dict[str, Any] | None:
    """One run; None where it has not ended and not failed."""
    run = arm.run(seed)
    own = {"arm": arm.name, "seed": seed, "overrides": dict(arm.overrides)}
    measured = run / "study.json"
    if measured.is_file():
        series = read_series([run / "metrics.csv"])
        seconds = series["seconds"].values[-1]
        curves = {name: list(zip(series[name].steps, series[name].values)) for name in CURVE if name in series}
        return {**own, **json.loads(measured.read_text()), "seconds": round(seconds), "curves": curves}
    log = STUDY / "log" / f"{arm.name}-{seed}.txt"
    lines = log.read_text().strip().splitlines() if log.is_file() else []
    return {**own, "failed": lines[-1]} if lines and lines[-1].startswith("error: ") else None


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the seeds' figures."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")
