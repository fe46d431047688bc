"""Work in a process of its own with limits, so that a hang, a crash or a flood of memory is an outcome like others."""

import os
import pickle
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.prepared import begin, ended

SECONDS, MEGABYTES = 10, 2000  # what no file may take: time of the processor, memory in use
STILL = 20.0  # seconds without work after which a process waits for something that never comes


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended.

    Attributes:
        code: exit code; negative: the number of the signal that ended it.
        seconds: time of the processor. megabytes: most memory in use. printed: stdout and stderr.
    """

    code: int
    seconds: float
    megabytes: float
    printed: str

    @property
    def kept_the_limits(self) -> bool:
        return self.code >= 0 and self.seconds < SECONDS and self.megabytes < MEGABYTES


def limited(work: Callable[[], object], printed: Path, room: int = 2 * MEGABYTES) -> Outcome:
    """Fork, do the work there with so many MB more than now; it must be called in a process without threads."""
    process = os.fork()
    if process == 0:
        _child(work, printed, room)
    status, usage = _wait(process)
    seconds = usage.ru_utime + usage.ru_stime
    text = printed.read_text(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024, text)


def _child(work: Callable[[], object], printed: Path, room: int) -> None:
    code = 1
    try:
        with printed.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 (until the process ends)
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + room * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS + 1))
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(process: int) -> tuple[int, resource.struct_rusage]:
    worked, since = "", time.monotonic()
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            return status, usage
        now = " ".join(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13])
        if now != worked:
            worked, since = now, time.monotonic()
        if time.monotonic() - since > STILL:
            os.kill(process, 9)
        time.sleep(0.01)


def outcomes(work: Callable[..., list[Outcome]], folder: Path, *arguments: object) -> list[Outcome]:
    """What work finds in a process that has no threads."""
    found = folder / "outcomes"
    process = begin(_report, work, folder, arguments, found, printed=folder / "printed by all")
    assert ended(process) == 0, (folder / "printed by all").read_text()
    return pickle.loads(found.read_bytes())


def _report(work: Callable[..., list[Outcome]], folder: Path, arguments: Sequence[object], found: Path) -> None:
    found.write_bytes(pickle.dumps(work(folder, *arguments)))


def commands(folder: Path, lines: Sequence[Sequence[str]]) -> list[Outcome]:
    """Run command lines of `dkdm` in a folder, each in a process of its own.

    A line that begins with a number has so many MB of memory more than the imports take.
    """
    from ldm_dkdm.commands.main import main

    os.chdir(folder)
    found = []
    for line in lines:
        room, words = (int(line[0]), line[1:]) if line[0].isdigit() else (2 * MEGABYTES, line)
        found.append(limited(lambda words=words: main(words[0], words[1:]), folder / "printed", room))
    return found
