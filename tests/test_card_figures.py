"""A card shows the figures of the weights beside it, and no others."""

import json
import shutil
from pathlib import Path

import pytest

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints.card import FILE_SHA256, NOT_MEASURED, sha256, write_readme
from ldm_dkdm.config.load import read_card
from ldm_dkdm.config.schema import ModelCard
from ldm_dkdm.evaluation.results import table
from ldm_dkdm.reports.model_figures import read_figures


def test_figures_of_other_weights_are_kept_elsewhere(teacher_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(teacher_folder, folder)
    card = read_card(folder / "config.yaml", ModelCard)
    own, other = sha256(folder / card.weights), "0123456789abcdef" * 4
    (folder / "evaluations").mkdir()
    figures = folder / "evaluation.json"

    def write(measured: str) -> None:
        figures.write_text(json.dumps({"agreement": 0.25, FILE_SHA256: measured}))
        record = {"samples": {"opened_from_sha256": measured}, "figures": {"KID": 0.5}}
        (folder / "evaluations" / "teacher-1.json").write_text(json.dumps(record))
        (folder / "evaluations" / "earlier").mkdir(exist_ok=True)
        (folder / "evaluations" / "earlier" / "evaluation-1.json").write_text(json.dumps({FILE_SHA256: measured}))

    write(own)
    write_readme(folder, card)
    assert "- agreement: 0.25" in (folder / "README.md").read_text() and read_figures([folder])[0].values
    write(other)
    write_readme(folder, card)
    assert "agreement" not in (folder / "README.md").read_text() and not read_figures([folder])[0].values
    with pytest.raises(UserError, match="has not been evaluated"):
        table([folder])
    kept = folder / "evaluations" / "of-01234567"
    assert sorted(file.name for file in kept.iterdir()) == ["evaluation-1.json", "evaluation.json", "teacher-1.json"]
    figures.write_text("{")  # damaged: left where it is
    write_readme(folder, card)
    assert NOT_MEASURED in (folder / "README.md").read_text() and figures.read_text() == "{"
