"""The same figures for any batch size and number of processes, also where processes are killed on the way."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm import load_model, measure
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.components import pixel_components
from ldm_dkdm.evaluation.gathering import gather
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import TensorImages
from ldm_dkdm.evaluation.statistics import Statistics
from tests.prepared import begin
from tests.slow_images import BATCH, gathered, images

A, B = (torch.randint(0, 250, (90, 32, 32, 3), dtype=torch.uint8).clamp(min=low) for low in (0, 60))


def test_figures_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    def figures(batch_size: int) -> dict[str, float]:
        return measure(A, B, features="pixels", batch_size=batch_size, cache=tmp_path / f"{batch_size}").figures

    wanted = figures(64)
    assert set(wanted) == {"KID-pixels", "precision-pixels", "recall-pixels", "pixel Frechet"}
    for batch_size in (1, 7):
        assert figures(batch_size) == pytest.approx(wanted, rel=1e-9)


def test_the_same_holds_for_samples_of_a_model_and_for_processes(teacher_folder: Path, tmp_path: Path) -> None:
    model = load_model(teacher_folder)
    components, _ = pixel_components(TensorImages(model.sample(70, steps=1, seed=100)), None, 64)

    def sums(batch_size: int, processes: int) -> Statistics:
        source = sampled(model, SamplingConfig(70, steps=1))
        options = {"batch_size": batch_size, "processes": processes, "cache": tmp_path / f"{batch_size}{processes}"}
        return gather(source, {"a": components}, set(), **options)["a"]

    wanted = sums(64, 1)
    assert np.trace(wanted.sigma) > 0.1
    for batch_size, processes in ((7, 1), (7, 2)):  # rounding moves a few pixels by a level of 1/255
        np.testing.assert_allclose(sums(batch_size, processes).mu, wanted.mu, atol=1e-3)
        np.testing.assert_allclose(sums(batch_size, processes).sigma, wanted.sigma, atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_killed_goes_on_and_ends_in_the_same_sums(processes: int, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = gathered(tmp_path / "whole", 1, batch_size=64)
    killed = tmp_path / "killed"
    saved = kill_when_saved(begin(gathered, killed, processes, 0.3), killed, processes)
    (killed / "log").unlink()
    found = gathered(killed, processes)
    read = sorted(map(int, (killed / "log").read_text().split()))
    firsts = [90 * part // processes for part in range(processes)]
    wanted = [number for first in firsts for number in range(first + saved[first], first + 90 // processes)]
    assert read == wanted and 0 < len(read) < 90
    np.testing.assert_array_equal(found["pixels"].features, images().flatten(1))
    for name in ("mu", "sigma"):
        expected = getattr(whole["components"], name)
        np.testing.assert_allclose(getattr(found["components"], name), expected, atol=1e-12, err_msg=name)
    assert not list(killed.rglob("*.partial.npz"))


def kill_when_saved(running: BaseProcess, folder: Path, processes: int) -> dict[int, int]:
    """Kill a process and its children once every part is partly saved; number of a part's first image -> of images."""
    try:
        end = time.monotonic() + 120
        while len(files := list((folder / "cache").glob("[!.]*.partial.npz"))) < processes:
            assert running.is_alive() and time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.join()
    found = {}
    for file in files:
        with np.load(file) as archive:
            own = archive["pixels/kept"]
            first = next(i for i, image in enumerate(images().flatten(1).numpy()) if (image == own[0]).all())
            found[first] = int(archive["done"])
            assert found[first] % BATCH == 0
    return found
