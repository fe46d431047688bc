"""The benchmarks run and say what they measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(name: str, *words: object) -> str:
    """Run benchmarks/<name> -> what it printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_training_with_and_without_data_is_timed_in_turns(tmp_path: Path) -> None:
    printed = benchmark(
        "training_speed.py", "quickstart", "--batch_size", 2, "--rounds", 1, "-o", tmp_path / "speed.json"
    )
    found = json.loads((tmp_path / "speed.json").read_text())
    (row,) = found["rows"]
    assert row["batch"] == 2 and found["machine"]["torch"] and found["rounds"] == 1
    ratio = row["without data"] / row["on data, encoding"]
    assert row["without / on data"] == pytest.approx(ratio) and f"{ratio:.3g}" in printed
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_memory_is_measured_for_every_size_of_the_pool(tmp_path: Path) -> None:
    benchmark("memory.py", "quickstart", "--batch_size", 2, "--rho", 0.5, "-o", tmp_path / "memory.json")
    on_data, pool = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert on_data["rho"] == "on data" and on_data["pool GB"] == 0
    assert pool["pool GB"] == pytest.approx(0.5 * 1000 * 2 * 3 * 16 * 16 * 2 / 1e9)  # slots of float16 latents
    assert pool["host GB"] > 0.1
