"""The warning that other programs keep the cores busy."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from ldm_dkdm.training import busy


def warned(
    idle: Iterable[float],
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> str:
    """What is said where each core was idle for a share of the time; cores 5 and 6 are not this process's."""
    shares = [*idle, 0.0, 0.0]
    numbers = [*range(len(shares) - 2), 5, 6]

    def counters(ticks: int) -> str:
        own = [
            f"cpu{n} {ticks * (1 - share):.0f} 0 0 {ticks * share:.0f} 0 0 0 0 7 7" for n, share in zip(numbers, shares)
        ]
        return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *own, "intr 1 2", "ctxt 3"])

    stat = tmp_path / "stat"
    stat.write_text(counters(1000))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(len(shares) - 2)))
    monkeypatch.setattr(busy.time, "sleep", lambda seconds: stat.write_text(counters(2000)))
    caplog.clear()
    busy.warn_if_busy(threads, stat)
    return caplog.text


def test_busy_cores_are_named_with_the_threads_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = tmp_path, monkeypatch, caplog
    text = warned([0.0, 0.9, 1.0, 1.0], 4, *given)
    assert "other programs keep 1 of 4 cores busy" in text and "OMP_NUM_THREADS=3" in text
    assert "2 of 2 cores busy" in warned([0.1, 0.0], 2, *given) and "OMP_NUM_THREADS=1" in caplog.text
    assert not warned([0.9, 0.8], 2, *given)  # nearly idle
    assert not warned([0.0, 1.0, 1.0, 1.0], 3, *given)  # there is room
    assert not warned([0.0, 0.0], 1, *given)  # one thread waits for no other
    monkeypatch.setattr(busy.time, "sleep", lambda seconds: None)
    busy.warn_if_busy(2, tmp_path / "nowhere")  # another system
    assert not caplog.text
