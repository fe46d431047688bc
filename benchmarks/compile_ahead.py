"""Compile what benchmarks/gpu.py measures, before it does, in processes beside each other: torch keeps it on the disk.

A network is compiled by one core, and larger ones take more than a minute each.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def compile_ahead(
    script: Path, recipes: Sequence[str], variants: Sequence[str], words: Sequence[str], end: float
) -> int:
    """Let a process make the first steps of each variant of each recipe; returns how many of them ended well.

    Args:
        words: further options of the script.
        end: when those are stopped that are still at work, by `time.monotonic`.
    """
    common = ["--parts", "steps", "--rounds", "1", "--ahead", "0", *words]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), recipe, *common, "--variants", variant],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for recipe in recipes
        for variant in variants
    ]
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return sum(process.returncode == 0 for process in processes)
