"""Two sets of images, the toy features and a folder of its own for tests of dkdm evaluate."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm.images import save_image, to_image
from tests.cli import run_script
from tests.feature_sets import add_toy

GENERATOR = torch.Generator().manual_seed(0)
A = torch.randint(0, 200, (70, 32, 32, 3), dtype=torch.uint8, generator=GENERATOR)
B = torch.randint(50, 256, (80, 32, 32, 3), dtype=torch.uint8, generator=GENERATOR)


@pytest.fixture(autouse=True)
def evaluation_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of one's own for results and the cache, with the toy features."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_DKDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("ldm_dkdm.commands.evaluate.RESULTS", Path("logs/results.csv"))
    add_toy(monkeypatch)
    np.savez(tmp_path / "a.npz", A.numpy())
    np.savez(tmp_path / "b.npz", B.numpy())


def evaluate(*arguments: object) -> int:
    return run_script("evaluate.py", *arguments)


def toy(*arguments: object) -> int:
    return evaluate(*arguments, "--features", "toy")


def record(path: str = "out.json") -> dict:
    return json.loads(Path(path).read_text())


def write_images(folder: str, images: torch.Tensor) -> None:
    for number, image in enumerate(images):
        save_image(to_image(image), Path(folder) / f"{number:03d}.png")


def results() -> list[dict[str, str]]:
    with Path("logs/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))
