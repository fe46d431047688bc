"""Measurements over ranks: the first computes what all need once, shares follow what is left, waits have no limit."""

import json
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import distributed

from ldm_dkdm import UserError, evaluate, load_model
from ldm_dkdm.commands import drawing
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation import components, frechet, gathering, partial
from ldm_dkdm.model import ranks as together
from ldm_dkdm.model.ranks import Ranks
from tests import rank_measurements
from tests.cli import sample
from tests.prepared import begin
from tests.rank_measurements import SIZES, pixel
from tests.test_ranks import all_ended, free_port, variables


@pytest.mark.timeout(300)
def test_the_first_rank_computes_once_what_all_ranks_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    for rank in (0, 1):
        own, printed = variables(**world, RANK=rank, LOCAL_RANK=rank), tmp_path / f"{rank}.log"
        started.append((begin(rank_measurements.main, tmp_path, printed=printed, environment=own), printed))
    codes = all_ended(started)
    assert [code for code, _ in codes] == [0, -9], codes
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    distances = ["frechet_distance", "frechet_distance"]
    assert first["calls"] == ["new_reference", "_some", *distances, "new_reference", "kernel_mmd"]
    assert second["calls"] == [] and first["kid"] == second["kid"]
    assert second["shown"] == [] and "held-out chains" in first["shown"]
    assert first["figures"] == second["figures"] and first["agreement"] == second["agreement"]
    assert first["refused"] == second["refused"] == "UserError: found by process 0"
    assert first["failed"] == "KeyError: 'found by process 0'"
    assert second["failed"] == "UserError: the first process failed: KeyError('found by process 0')"
    monkeypatch.setattr(frechet, "IMAGES", 70)
    alone = evaluate(pixel(0), pixel(1), cache=tmp_path / "alone", **SIZES)
    assert alone.keys() == first["figures"].keys()
    for name in ("agreement", "x0_drift", "untrained_q1", "frechet_student_to_teacher", "frechet_teacher_to_teacher"):
        assert first["figures"][name] == pytest.approx(alone[name], rel=1e-6), name
    assert "another process of the run has ended" in (tmp_path / "lost.txt").read_text()


def test_a_process_waits_for_the_others_work_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "new_group", lambda **options: given.append(options))
    monkeypatch.setattr(distributed, "barrier", lambda group: None)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with together.together():
        pass
    assert [options["timeout"] for options in given] == [timedelta(days=30)]


@pytest.mark.parametrize("module", [gathering, components, partial])
def test_a_damaged_file_may_have_been_removed_by_another_process(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "damaged.npz"
    file.write_bytes(b"")

    def removed(path: Path, *_: object) -> None:
        path.unlink()
        raise UserError(f"{path}: is damaged")

    if module is gathering:
        monkeypatch.setattr(gathering.Statistics, "read", removed)
        assert gathering._cached(file, False) is None
    else:
        monkeypatch.setattr(module, "read_arrays", removed)
        assert not (components._cached(file) if module is components else partial._resumed(file, {}))


class Simulated(Ranks):
    """One of two ranks, without the other."""

    def from_first(self, value):
        return value

    def on_first(self, work):
        return work()

    def gather(self, value):
        return [value] * 2


@pytest.mark.parametrize(("rank", "share"), [(0, [4, 20]), (1, [12])])
def test_batches_that_are_left_are_dealt_evenly(
    rank: int, share: list[int], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = load_model(teacher_folder), SamplingConfig(23, 4, steps=1)
    outputs = drawing.Outputs(png=False, npz=True, latents=False)
    parts = drawing.parts_of(model, config, tmp_path, outputs)
    for first in (0, 8, 16):  # all that the first of two ranks draws
        parts.keep(first, torch.zeros(4, 2, 2, 3, dtype=torch.uint8), torch.zeros(0), None)
    drawn: list[list[int]] = []
    batches = drawing.sample_batches
    monkeypatch.setattr(drawing, "sample_batches", lambda *given: (drawn.append(given[2]), batches(*given))[1])
    monkeypatch.setattr(drawing, "_join", lambda *_: None)
    drawing.draw(model, "model", config, tmp_path, outputs, Simulated(rank, 2))
    assert drawn == [share]


def test_what_interrupted_calls_left_is_named_with_its_size(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("-r", teacher_folder, "-n", 6, "-c", 1, "--batch_size", 4, "--device", "cpu", "-l", tmp_path / "a b")
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "_join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(*arguments)
    (folder,) = (tmp_path / "a b").glob(".parts-*")
    capsys.readouterr()
    assert sample(*arguments, "--seed", 1) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if ".parts-" in line]
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert folder.name in line and f"{size / 1000:.1f} KB of other calls" in line
    assert line.endswith(f"rm -r '{tmp_path / 'a b'}'/.parts-*") and folder.is_dir()
    assert sample(*arguments) == 0  # finishes the interrupted call
    assert ".parts-" not in capsys.readouterr().out and not folder.exists()
