"""Output folders with files of other calls: what of an interrupted one still counts, what is said of the rest."""

import shutil
from pathlib import Path

import pytest

from ldm_dkdm.commands import drawing
from tests.cli import contents, sample
from tests.test_ranks import stopping

FEW = ("-n", 6, "-c", 1, "--batch_size", 2, "--device", "cpu", "-l")


@pytest.mark.parametrize("meanwhile", ["removed", "another call's"])
def test_a_batch_whose_images_are_gone_is_drawn_again(
    meanwhile: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert sample("-r", teacher_folder, *FEW, whole) == 0
    batches = drawing.sample_batches
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample_batches", lambda *given: stopping(batches(*given), 2))
        with pytest.raises(ZeroDivisionError):
            sample("-r", teacher_folder, *FEW, out)
    if meanwhile == "removed":
        for file in out.iterdir():  # as `rm -r out/*` does
            if not file.name.startswith("."):
                shutil.rmtree(file)
    else:  # the first batch only
        assert sample("-r", teacher_folder, "-n", 2, "-e", 1, *FEW[2:], out) == 0
    capsys.readouterr()
    assert sample("-r", teacher_folder, *FEW, out) == 0
    assert contents(out) == contents(whole)
    left = {"removed": 2, "another call's": 1}[meanwhile]
    lines = capsys.readouterr().out
    assert f"{left} batch{'es' * (left > 1)} of this call must be drawn again" in lines
    assert ("goes on after 1 of 3 batches" in lines) == (left == 1)
