"""Compile what benchmarks/gpu.py measures, before it does, in processes beside each other: torch keeps it on the disk.

A network is compiled by one core, and larger ones take more than a minute each.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CORES = 4  # for each process: it compiles kernels in others


def compile_ahead(
    script: Path, recipes: Sequence[str], variants: Sequence[str], words: Sequence[str], end: float
) -> list[str]:
    """Let a process make the first steps of each variant of each recipe; returns why others than these ended.

    Args:
        words: further options of the script.
        end: when those are stopped that are still at work, by `time.monotonic`.
    """
    common = ["--parts", "steps", "--rounds", "1", "--ahead", "0", *words]

    def one(recipe: str, variant: str) -> str | None:
        command = [sys.executable, str(script), recipe, *common, "--variants", variant]
        try:
            left = max(0.0, end - time.monotonic())
            done = subprocess.run(command, timeout=left, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return f"{recipe}, {variant}: the time is up"
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return f"{recipe}, {variant}: {last}" if done.returncode else None

    wanted = [(recipe, variant) for recipe in recipes for variant in variants]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // CORES)) as pool:
        return [reason for reason in pool.map(lambda pair: one(*pair), wanted) if reason is not None]
