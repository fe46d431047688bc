"""What a page about runs says of the figures that `dkdm evaluate` has kept beside their models."""

import math
from pathlib import Path

from ldm_dkdm import write_report
from ldm_dkdm.reports.run_files import read_runs
from ldm_dkdm.reports.texts import rows_of
from tests.cli import write_yaml
from tests.run_folders import CARD, RECORD, begun, finished, write_json
from tests.test_report import data_in, read_run


def test_records_of_one_reference_are_told_apart(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    write_json(run / "student" / "evaluations" / "emoji-zz.json", {**RECORD, "figures": {"FID": 3}})
    assert read_run(run).figures.values["emoji · FID"] == "12.5"
    assert read_run(run).figures.values["emoji-zz · FID"] == "3"


def test_figures_of_other_settings_are_not_in_one_row(tmp_path: Path) -> None:
    def record(images: int, value: float, sha256: str = "ab", **samples: object) -> dict[str, object]:
        own = {"source": "run", "images": images, "seeds": f"0 ... {images - 1}", "weights": "EMA", **samples}
        theirs = {"source": "x/data.npz", "sha256": sha256, "images": 50}
        return {**RECORD, "figures": {"FID": value}, "samples": own, "reference": theirs}

    sets = {  # run -> hash in the file's name -> record
        "a": {"1": record(70, 1), "2": record(80, 2), "3": record(70, 3, steps=9)},
        "b": {"0": record(90, 4), "1": record(80, 5), "2": record(70, 6, "cd"), "3": record(70, 7, weights="raw")},
        "c": {"0": record(70, 8, sha256="ab")},
    }
    for name, records in sets.items():
        run = begun(tmp_path / name)
        write_yaml(run / "student" / "config.yaml", CARD)
        by = f"ldm_dkdm 0.2.0: dkdm evaluate -n {65 if name == 'c' else 70} -c 20"
        figures = {"agreement": 0.5, "student_parameters": 7, "measured_with": by}
        write_json(run / "student" / "evaluation.json", figures)
        for key, tree in records.items():
            write_json(run / "student" / "evaluations" / f"data-{key}.json", tree)
    found = [run.figures.values for run in read_runs([tmp_path / name for name in sets])]
    rows = dict(rows_of(found))
    assert rows == {
        "-n 70 · agreement": ["0.5", "0.5", ""],
        "-n 65 · agreement": ["", "", "0.5"],
        "student parameters": ["7", "7", "7"],
        "data · 70 images · EMA · reference ab · FID": ["1", "", "8"],
        "data · 80 images · EMA · reference ab · FID": ["2", "5", ""],
        "data · 70 images · 9 steps · EMA · reference ab · FID": ["3", "", ""],
        "data · 90 images · EMA · reference ab · FID": ["", "4", ""],
        "data · 70 images · EMA · reference cd · FID": ["", "6", ""],
        "data · 70 images · raw · reference ab · FID": ["", "7", ""],
    }
    assert "data · FID" in read_runs([tmp_path / "c"])[0].figures.values


def test_figures_of_images_of_another_size_are_not_in_one_row(tmp_path: Path) -> None:
    sizes = {
        "a": {"size": 32},
        "b": {"size": 64},
        "c": {"size": 32, "resized": "bicubic"},
        "d": {"rounding": "nearest"},
    }
    for name, facts in sizes.items():
        run = begun(tmp_path / name)
        write_yaml(run / "student" / "config.yaml", CARD)
        tree = {**RECORD, "figures": {"FID": 1}, "samples": facts, "reference": facts}
        write_json(run / "student" / "evaluations" / "data-1.json", tree)
    rows = dict(rows_of([run.figures.values for run in read_runs([tmp_path / name for name in sizes])]))
    assert rows == {
        "data · size 32 · FID": ["1", "", "", ""],
        "data · size 64 · FID": ["", "1", "", ""],
        "data · size 32 · resized bicubic · FID": ["", "", "1", ""],
        "data · rounding nearest · FID": ["", "", "", "1"],
    }


def test_figures_of_other_weights_of_a_model_are_told_apart(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    for number, digest in enumerate(("abc", "def"), 1):
        tree = {**RECORD, "samples": {"sha256": digest}, "figures": {"FID": number}}
        write_json(run / "student" / "evaluations" / f"data-{number}.json", tree)
    values = read_run(run).figures.values
    assert (values["data · weights abc · FID"], values["data · weights def · FID"]) == ("1", "2")


def test_hashes_and_settings_are_provenance_and_no_figures(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    texts = {"measured_with": "dkdm evaluate -n 65", "student_sha256": "ab12", "warnings": ["few", "JPEG"]}
    write_json(run / "student" / "evaluation.json", {"agreement": 0.25, **texts})
    found = read_run(run).figures
    own = {name: value for name, value in found.values.items() if not name.startswith("emoji")}
    assert own == {"agreement": "0.25"}
    shown = {"measured with": "dkdm evaluate -n 65", "student sha256": "ab12", "warnings": "few, JPEG"}
    assert shown.items() <= found.provenance.items()


def test_a_figure_that_is_not_a_number_is_no_point(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    write_json(run / "student" / "evaluation.json", {"FID": math.nan, "by_t": {"0": 1, "1": math.nan, "2": 3, "3": 4}})
    page = write_report([run], tmp_path / "report.html")
    assert data_in(page)["runs"][0]["points"]["by_t"] == {"x": [0, 2, 3], "y": [1, 3, 4]}
    assert read_run(run).figures.values["FID"] == "nan"
