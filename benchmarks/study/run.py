"""Make the runs of the study that are missing: python benchmarks/study/run.py [COMPARISON | ARM ...] [--workers 2]

Each run is a folder in logs/study with its config, metrics and figures. What was interrupted goes on; what failed is
tried again and is reported until it succeeds. results.json beside this file gets the figures of all runs; a run that it
has already, by this machine or another, is not made again without --again.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from plan import STUDY, Task, read_plan, tasks_of
from results import FAILURES, measured_runs, write_results

MARKS = STUDY / "done"  # commands that have ended well
BEGUN = STUDY / "begun"
LOGS = STUDY / "log"


def main() -> None:
    """Run everything that is missing; several at a time, each with one thread."""
    plan = read_plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wanted", nargs="*", metavar="COMPARISON", help=f"or an arm; {', '.join(plan['comparisons'])}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--again", action="store_true", help="make runs too that results.json has")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no task after so many minutes")
    options = parser.parse_args()
    if unknown := set(options.wanted) - {*plan["comparisons"], *plan["arms"]}:
        parser.error(f"no comparison or arm of that name: {', '.join(sorted(unknown))}")
    measured = set() if options.again else measured_runs(plan)
    tasks = tasks_of(plan, options.wanted or list(plan["comparisons"]), without=measured)
    for task in tasks:
        refuse_other_plan(task)
    failed = carry_out(tasks, options.workers, time.monotonic() + 60 * options.minutes)
    print(write_results(plan))
    for name in failed:
        print(f"failed: {name}, see {log_of(name)}")
    sys.exit(1 if failed else 0)


def carry_out(tasks: list[Task], workers: int, end: float) -> list[str]:
    """Carry out what is not done yet, as many tasks at a time as there are workers; returns what failed."""
    left = {task.name: task for task in tasks if not is_done(task)}
    total, failed, begun = len(left), list[str](), time.monotonic()
    running: dict[Future[bool], Task] = {}
    with ThreadPoolExecutor(workers) as pool:
        while left or running:
            ready = [task for task in left.values() if not blocked(task, left, running, failed)]
            if time.monotonic() < end:
                for task in ready[: workers - len(running)]:
                    running[pool.submit(carry_out_one, left.pop(task.name))] = task
            if not running:
                break  # the time is over, or what is left needs something that failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                failed += [] if future.result() else [task.name]
                done = total - len(left) - len(running)
                minutes = (time.monotonic() - begun) / 60
                rest = minutes / done * (total - done)
                print(f"{done}/{total} {task.name}, {minutes:.0f} min, ETA {rest:.0f} min", flush=True)
    return failed


def blocked(task: Task, left: dict[str, Task], running: dict[Future[bool], Task], failed: list[str]) -> bool:
    """Whether something that a task needs is not done."""
    missing = {*left, *failed, *(other.name for other in running.values())}
    return any(name in missing for name in task.after)


def is_done(task: Task) -> bool:
    """Whether a task has been carried out."""
    return text_in(note(MARKS, task.name)) == task.text and (task.makes is None or task.makes.exists())


def refuse_other_plan(task: Task) -> None:
    """End where a run was begun with another command: it would go on with that."""
    if task.run is not None and task.run.exists() and text_in(note(BEGUN, task.name)) not in ("", task.text):
        sys.exit(f"{task.run}: was begun with another plan; delete it to make it again")


def text_in(file: Path) -> str:
    """The content of a small file; empty where there is none."""
    return file.read_text() if file.is_file() else ""


def carry_out_one(task: Task) -> bool:
    """Run a command to its end; an interrupted run goes on."""
    command = list(task.command)
    if task.run is not None and (task.run / "config.yaml").is_file():
        command = [*command[: command.index("--base")], "--resume", str(task.run)]
    log, mark, begun, failure = (note(folder, task.name) for folder in (LOGS, MARKS, BEGUN, FAILURES))
    for file in (log, mark, begun, failure):
        file.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(task.text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=environment, check=False)
    if done.returncode == 0:
        mark.write_text(task.text)
        failure.unlink(missing_ok=True)
    else:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        failure.write_text(f"exit code {done.returncode}: {last}")
    return done.returncode == 0


def log_of(name: str) -> Path:
    """What a task printed."""
    return note(LOGS, name)


def note(folder: Path, name: str) -> Path:
    """A small file about a task; `digits` and `digits/dkdm-0` are both names."""
    return folder / f"{name}.txt"


if __name__ == "__main__":
    main()
