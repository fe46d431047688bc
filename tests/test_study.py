"""The study: a plan that can be carried out, runs that go on, figures that become a page."""

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, NetworkConfig
from ldm_dkdm.evaluation.features import open_extractor
from ldm_dkdm.networks import NETWORKS
from tests.cli import ROOT

STUDY = ROOT / "benchmarks" / "study"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(STUDY)
    for known in ("plan", "results", "run", "page"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    return importlib.import_module(name)


def test_every_planned_run_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = module("plan", monkeypatch)
    known = plan.read_plan()
    assert {arm for entry in known["comparisons"].values() for arm in plan.arms_in(entry)} == set(known["arms"])
    monkeypatch.chdir(ROOT)
    tasks = plan.tasks_of(known, list(known["comparisons"]))
    seen, networks = set[str](), dict[str, NetworkConfig]()
    for task in tasks:
        assert set(task.after) <= seen, task.name
        seen.add(task.name)
        if task.run is not None and task.name.endswith("-0"):  # other seeds differ in that alone
            words = list(task.command[3:])
            base = [word for word in words[1:] if "=" not in word]
            overrides = [word for word in words[1:] if "=" in word]
            config = load_config(base, overrides, schema=DistillRun if task.command[2] == "distill" else DiffusionRun)
            assert Path(config.logging.dir) / str(config.logging.name) == task.run
            node = config.student if isinstance(config, DistillRun) else config.model
            networks[repr(node)] = node
    with torch.device("meta"):
        for node in networks.values():
            build(node, NETWORKS)


def test_runs_that_differ_in_their_student_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = module("plan", monkeypatch)
    tasks = {task.name: task for task in plan.tasks_of(plan.read_plan(), ["levers-digits"])}
    names = ("dkdm", "v", "cap")
    pools = {name: next(word for word in tasks[f"digits/{name}-0"].command if "pool_from" in word) for name in names}
    assert pools["dkdm"] == pools["v"] != pools["cap"]
    assert sum("pool-" in name for name in tasks) == 3 * 3  # batch128 and cap have their own


def task_of(plan: ModuleType, code: str, run: Path | None = None) -> Any:
    return plan.Task("a", ("-c", code, "--base", "x"), None, (), run)


def test_a_run_goes_on_and_what_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = module("run", monkeypatch)
    plan = sys.modules["plan"]
    failing = task_of(plan, "import sys; print('error: no'); sys.exit(2)")
    after = plan.Task("b", ("-c", "pass"), None, ("a",))
    assert run.carry_out([failing, after], 2, float("inf")) == ["a"]
    assert not run.is_done(after) and run.log_of("a").read_text() == "error: no\n"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    fine = task_of(plan, "import sys; open('words', 'w').write(' '.join(sys.argv[1:]))", folder)
    assert run.carry_out([fine, after], 2, float("inf")) == []
    assert Path("words").read_text() == f"--resume {folder}" and run.is_done(after)
    assert not run.is_done(task_of(plan, "another plan"))
    with pytest.raises(SystemExit, match="was begun with another plan"):
        run.refuse_other_plan(task_of(plan, "another plan", folder))
    inside = plan.Task("b/c", ("-c", "pass"))
    assert run.carry_out([inside], 1, float("inf")) == [] and run.is_done(inside) and run.is_done(after)
    late = plan.Task("c", ("-c", "pass"))
    assert run.carry_out([late], 1, 0.0) == [] and not run.is_done(late)  # the time is over: left for the next call


def test_failures_and_measured_runs_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, results = module("run", monkeypatch), sys.modules["results"]
    plan = sys.modules["plan"]
    assert run.carry_out([plan.Task("digits/dkdm-1.measured", ("-c", "raise ValueError(3)"))], 1, float("inf"))
    measured = plan.STUDY / "digits" / "dkdm-0"
    measured.mkdir(parents=True)
    (measured / "study.json").write_text(json.dumps({"figures": {}, "parameters": 1, "calls": {}}))
    (measured / "metrics.csv").write_text("step,seconds,agreement\n1,2.6,0.5\n")
    (measured.parent / "teacher.json").write_text(json.dumps({"figures": {"FD": 9.5}}))
    found = results.read_results(results.write_results(plan.read_plan(), tmp_path / "results.json"))
    assert found["failed"] == {"digits/dkdm-1.measured": "exit code 1: ValueError: 3"}
    assert found["teachers"] == {"digits": {"FD": 9.5}}
    (row,) = found["runs"]
    assert (row["arm"], row["seed"], row["seconds"], row["curves"]) == ("digits/dkdm", 0, 3, {"agreement": [[1, 0.5]]})


def named(features: str, prefix: str) -> str:
    """A figure's name as `measure` gives it."""
    return open_extractor(features, "cpu").titled(prefix)


def row(arm: str, seed: int, distance: float) -> Mapping[str, Any]:
    curves = {"agreement": [[100, 0.1 * distance], [200, 0.05 * distance]]}
    name = named("efficientnet-lite0", "FD")
    figures = {f"{name}'": distance, name: 2 * distance, "agreement": 0.05}
    own = {"arm": arm, "seed": seed, "overrides": {}, "figures": figures, "parameters": 1_500_000}
    return {**own, "calls": {"training": 64_000, "warm-up": 1000}, "seconds": 60, "curves": curves}


def test_a_run_is_measured_once_more_by_more_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = module("plan", monkeypatch)
    tasks = {task.name: task for task in plan.tasks_of(plan.read_plan(), ["many"])}
    made = {name: task for name, task in tasks.items() if "many" in name}
    runs = [f"{arm}-{seed}.many" for seed in range(3) for arm in plan.read_plan()["many"]["arms"]]
    assert sorted(made) == sorted([*runs, "digits-teacher-many.json"])  # one teacher of both pairs, measured once
    assert made["digits/improved-long-0.many"].after == ("digits/improved-long-0",)
    monkeypatch.chdir(tmp_path)
    results = module("results", monkeypatch)
    arm = sys.modules["plan"].arms_of(plan.read_plan())["digits/improved-long"]
    for file, figures in {
        arm.run(0) / "study.json": {"FD": 3.0},
        arm.run(0) / "study-many.json": {"FD (many)": 2.0},
        arm.floor: {"FD": 1.0},
        arm.many_floor: {"FD (many)": 0.5},
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"figures": figures, "parameters": 1, "calls": {}}))
    (arm.run(0) / "metrics.csv").write_text("step,seconds,agreement\n1,2.6,0.5\n")
    found = results.read_results(results.write_results(plan.read_plan(), tmp_path / "results.json"))
    assert found["runs"][0]["figures"] == {"FD": 3.0, "FD (many)": 2.0}
    assert found["teachers"]["digits"] == {"FD": 1.0, "FD (many)": 0.5}


def test_the_page_marks_what_is_beyond_the_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = module("page", monkeypatch)
    results = tmp_path / "results.json"
    rows = [row("digits/iterative", seed, 40.0 + seed) for seed in range(3)]
    rows += [row("digits/shuffled", seed, 39.5 + seed) for seed in range(3)]
    rows += [row("digits/dkdm", seed, 20.0 + seed) for seed in range(2)]
    teachers = {"digits": {named("efficientnet-lite0", "FD") + "'": 15.25}}
    results.write_text(
        json.dumps({"teachers": teachers, "runs": rows, "failed": {"digits/dkdm-2": "error: no memory"}})
    )
    monkeypatch.setattr(page, "read_results", lambda: sys.modules["results"].read_results(results))
    monkeypatch.setattr(page, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(page, "PLOTS", tmp_path / "evidence")
    page.main()
    text = (tmp_path / "evidence.md").read_text()
    assert "| teacher of `digits` to itself | | | | | 15.2 |" in text
    others = [{**found, "overrides": {"teacher.ckpt": found["arm"]}} for found in rows]  # each arm has its own teacher
    results.write_text(json.dumps({"teachers": teachers, "runs": others}))
    monkeypatch.setattr(page, "plot", lambda *words: None)  # the plots above stay
    page.main()
    assert "to itself |" in text.partition("(Fig. 4a)")[2].partition("\n## ")[0]
    assert "to itself |" not in (tmp_path / "evidence.md").read_text().partition("(Fig. 4a)")[2].partition("\n## ")[0]
    assert "- failed: `digits/dkdm-2`: error: no memory" in text and "8 of " in text
    section = text.partition("## Three ways to make batches (Fig. 4a)")[2].partition("## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    assert lines[0].startswith("| `digits/iterative` | 3 | 1.50 | 64 + 1 | 1.0 | 41 ± 1 |")
    assert [line.split("|")[-2].strip() for line in lines] == ["1.00", "0.99", "**0.50**"]
    assert (tmp_path / "evidence" / "fig4a.png").is_file() and (tmp_path / "evidence" / "fig4a-curves.png").is_file()
    assert "Not run yet: `digits/rho0.01`" in text


def test_the_committed_page_is_that_of_the_committed_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = module("page", monkeypatch)
    monkeypatch.setattr(page, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(page, "PLOTS", tmp_path / "evidence")
    monkeypatch.setattr(page, "plot", lambda *words: None)
    page.main()
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs" / "evidence.md").read_text()


def test_what_another_machine_has_measured_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, results = module("plan", monkeypatch), importlib.import_module("results")
    known = plan.read_plan()
    own = dict(plan.arms_of(known)["digits/rho0.03"].overrides)
    rows = [
        {**row("digits/rho0.03", 0, 3.0), "overrides": own},
        {**row("digits/rho0.03", 1, 3.0), "overrides": {**own, "distill.rho": 0.5}},  # the plan has another one now
        row("digits/improved-long", 0, 3.0),  # not measured by many samples
        row("digits/improved-long", 1, 3.0),
        row("digits/left-the-plan", 0, 3.0),
    ]
    rows[3]["figures"]["FD-efficientnet' (many)"] = 2.0
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": rows}))
    measured = results.measured_runs(known, file)
    assert measured == {("digits/rho0.03", 0), ("digits/improved-long", 1)}
    names = {task.name for task in plan.tasks_of(known, ["digits/rho0.03", "many"], without=measured)}
    assert {"digits/rho0.03-1", "digits/improved-long-0.many", "digits"} < names
    assert not {"digits/rho0.03-0", "digits/rho0.03-0.measured", "digits/improved-long-1.many"} & names
