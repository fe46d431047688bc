"""The study's plan: what is prepared, which runs are made, and which tables they make."""

import hashlib
import itertools
import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast
STUDY = Path("logs/study")  # in the folder where the study is started
MANY = "study-many.json"  # in the folder of a run that is measured once more by more samples
POOL_RUN = {"trainer.max_steps": 1, "trainer.max_minutes": None, "logging.evaluate_every": 0}  # others use its pool


LEAVE = "leave"  # the value of a key of the pair that an arm does not have
NOT_OVERRIDES = ("base", "tried")  # keys of an arm that name a further config, and a lever of tried.py


@dataclass(frozen=True)
class Task:
    """A command, and what it makes.

    Attributes:
        name: names its log and its mark in `STUDY`.
        command: words after the interpreter's name.
        makes: a file or folder; where there is none, the mark alone says that it is done.
        after: names of tasks before it.
        run: the run folder, which is resumed where it is there already.
    """

    name: str
    command: tuple[str, ...]
    makes: Path | None = None
    after: tuple[str, ...] = ()
    run: Path | None = None

    @property
    def text(self) -> str:
        """The command as text, which says whether a task of this name has been another one."""
        return shlex.join(self.command).replace(str(ROOT), ".")


@dataclass(frozen=True)
class Arm:
    """What the runs of one arm have in common."""

    name: str
    pair: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether its runs train on images."""
        return bool(self.pair.get("train"))

    @property
    def teacher(self) -> str:
        """What its students are compared with."""
        return self.overrides.get("teacher.ckpt", self.pair["teacher"])

    @property
    def teacher_name(self) -> str:
        """The pair's name; the arm's own where it has a teacher of its own."""
        return self.name.partition("/")[0] if self.teacher == self.pair["teacher"] else self.name

    @property
    def floor(self) -> Path:
        """The figures of the teacher beside itself, with other seeds: no student can be nearer to it."""
        return STUDY / self.teacher_name / "teacher.json"

    @property
    def many_floor(self) -> Path:
        """The same of as many samples as the plan's `many`, once for all pairs of a teacher."""
        return STUDY / f"{Path(self.teacher).name}-many.json"

    def run(self, seed: int) -> Path:
        """Run folder of a seed."""
        return STUDY / f"{self.name}-{seed}"


def read_plan(path: Path = HERE / "plan.yaml") -> dict[str, Any]:
    """The plan, with the folder of the runs in its paths."""
    return yaml.load(path.read_text().replace("{study}", str(STUDY)), LOADER)


def arms_of(plan: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms by name."""
    found = {}
    for name, changes in plan["arms"].items():
        pair = plan["pairs"][name.partition("/")[0]]
        merged = {**pair["set"], **changes}
        found[name] = Arm(name, pair, {key: value for key, value in merged.items() if value != LEAVE})
    return found


def arms_in(comparison: Mapping[str, Any]) -> list[str]:
    """The arms of a comparison, group by group."""
    return [arm for group in comparison["groups"] for arm in group]


def tasks_of(plan: Mapping[str, Any], wanted: list[str], without: Collection[tuple[str, int]] = ()) -> list[Task]:
    """Every task of some comparisons or arms: one after the other, seed by seed, each task after what it needs.

    Args:
        plan: as `read_plan` gives it.
        wanted: names of comparisons and of arms.
        without: arms and seeds whose runs are not made.
    """
    arms, prepared = arms_of(plan), {task.name: task for task in _preparations(plan)}
    needed: dict[str, Task] = {}
    for own, seed in itertools.product(wanted, plan["seeds"]):
        for name in [own] if own in arms else arms_in(plan["comparisons"][own]):
            for task in _runs(arms[name], seed, plan) if (name, seed) not in without else ():
                for before in [*_before(task, prepared), task]:
                    needed.setdefault(before.name, before)
    return list(needed.values())


def _before(task: Task, known: Mapping[str, Task]) -> Iterator[Task]:
    for name in task.after:
        if name in known:
            yield from _before(known[name], known)
            yield known[name]


def _preparations(plan: Mapping[str, Any]) -> Iterator[Task]:
    for name, entry in plan["prepared"].items():
        makes, after = Path(entry["makes"]), tuple(entry.get("after", ()))
        if "script" in entry:
            script, *words = entry["script"].split()
            yield Task(name, (str(ROOT / script), *words), makes, after)
        elif "call" in entry:
            yield Task(name, ("-m", "ldm_dkdm", *entry["call"].split()), makes, after)
        else:
            folder = makes.parent
            words = ("train", "--base", *entry["train"].split(), *_place(folder))
            yield Task(name, ("-m", "ldm_dkdm", *words), makes, after, folder)


def _runs(arm: Arm, seed: int, plan: Mapping[str, Any]) -> Iterator[Task]:
    """A run, the pool that it shares before it, and its measurement after it."""
    run, needs = arm.run(seed), list(arm.pair.get("needs", ()))
    needs += [name for name, entry in plan["prepared"].items() if entry["makes"] in map(str, arm.overrides.values())]
    overrides = {**arm.overrides, "trainer.seed": seed}
    if not arm.trains and overrides.get("distill.variant", "dynamic") == "dynamic":
        pool = _pool_run(arm, seed)
        yield _training(arm, pool, {**_pool_keys(arm), **POOL_RUN, "trainer.seed": seed}, needs)
        overrides["distill.pool_from"], needs = str(pool), [*needs, _name(pool)]
    yield _training(arm, run, overrides, needs)
    data = str(arm.pair.get("data", ""))
    command = (str(HERE / "measure.py"), str(run), arm.pair["teacher"], data)
    yield Task(f"{_name(run)}.measured", command, run / "study.json", (_name(run),))
    command = (str(HERE / "measure.py"), "floor", arm.teacher, str(arm.floor), data)
    yield Task(_name(arm.floor), command, arm.floor, tuple(arm.pair.get("needs", ())))
    if arm.name in plan["many"]["arms"]:
        command = (str(HERE / "measure.py"), "many", str(run), arm.teacher, str(run / MANY))
        yield Task(f"{_name(run)}.many", command, run / MANY, (_name(run),))
        command = (str(HERE / "measure.py"), "many", arm.teacher, arm.teacher, str(arm.many_floor))
        yield Task(_name(arm.many_floor), command, arm.many_floor, tuple(arm.pair.get("needs", ())))


def _training(arm: Arm, run: Path, overrides: Mapping[str, Any], needs: list[str]) -> Task:
    words = [f"{key}={json.dumps(value)}" for key, value in overrides.items() if key not in NOT_OVERRIDES]
    quiet = ["logging.save_every=500", "logging.sample_every=1000000", "logging.loggers=[csv]"]
    if not arm.trains and "logging.evaluate_every" not in overrides:
        quiet.append("logging.evaluate_every=100")
    bases = [*arm.pair["base"].split(), *([arm.overrides["base"]] if "base" in arm.overrides else [])]
    program = (str(HERE / "tried.py"), arm.overrides["tried"]) if "tried" in overrides else ("-m", "ldm_dkdm")
    command = (*program, "train" if arm.trains else "distill", "--base", *bases, *words, *quiet)
    return Task(_name(run), (*command, *_place(run)), None, tuple(needs), run)


def _pool_run(arm: Arm, seed: int) -> Path:
    """The run whose pool an arm's run uses: that of all arms of the pair that agree in what fills a pool."""
    digest = hashlib.sha256(json.dumps(_pool_keys(arm), sort_keys=True).encode()).hexdigest()[:8]
    return STUDY / arm.name.partition("/")[0] / f"pool-{digest}-{seed}"


def _pool_keys(arm: Arm) -> dict[str, Any]:
    keys = tuple(arm.pair["pool"])
    return {key: value for key, value in arm.overrides.items() if key.startswith(keys)}


def _place(run: Path) -> tuple[str, str]:
    return f"logging.dir={run.parent}", f"logging.name={run.name}"


def _name(run: Path) -> str:
    return str(run.relative_to(STUDY))
