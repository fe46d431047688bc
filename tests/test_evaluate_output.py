"""What `dkdm evaluate` prints: narrow tables of what differs, a paragraph of what is the same, one line a warning."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm.checkpoints.averaging import UNSAID
from ldm_dkdm.commands.evaluate_output import measured_on
from ldm_dkdm.evaluation.comparability import doubts
from ldm_dkdm.evaluation.results import table
from ldm_dkdm.evaluation.sources import TensorImages
from ldm_dkdm.reporting import in_home
from tests.evaluate_sets import A, evaluation_home, record, toy  # noqa: F401 (a fixture)

STUDENT = {
    "source": "logs/quickstart/student",
    "kind": "model",
    "arithmetic": "32",
    "guidance": 1.0,
    "parameters": 2_871_299,
    "weights": "EMA",
    "opened_from": "logs/quickstart/student/student.safetensors",
    "sha256": "80475362a8aab62b9415ad8704014e9a4fa0a370b00f515913516c9469eb531f",
    "opened_from_sha256": "77a44c1f44045c9cb8248fbdd011d7af72d5c602a98982cac1133964b690a18f",
    "size": 64,
    "rounding": "truncated, as ADM",
    "images": 66,
    "seeds": "0 ... 65",
    "steps": 20,
    "eta": 0.0,
    "agreement by": "ldm_dkdm 0.2.0: dkdm evaluate -n 66 -c 2 --chains 1 --pairs 2 --seed 0",
}
TEACHER = {
    **{name: value for name, value in STUDENT.items() if name != "agreement by"},
    "source": "/a/folder/of/somebody/whose/name/is/long/models/teachers/emoji64",
    "opened_from": "/a/folder/of/somebody/whose/name/is/long/models/teachers/emoji64/model.safetensors",
    "parameters": 11_116_739,
    "weights": UNSAID,
    "sha256": "0170fe63894a4a65ec48e5dcefae36d4b2220e5d69e96631dfa9479e40d8237a",
    "seeds": "66 ... 131",
}

FIGURES = {"student_parameters": 7, "student_gflops": 1.5, "agreement": 0.25}


@pytest.mark.parametrize("width", [80, 100])
def test_what_two_sets_were_measured_on_fits_the_terminal(width: int) -> None:
    lines = "\n".join(measured_on(STUDENT, TEACHER, width)).splitlines()
    assert max(map(len, lines)) <= width
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["measured on", "samples", "reference"]
    source, *rows = table[2:]
    assert source[1] == "logs/quickstart/student"
    assert source[2].startswith(".../") and source[2].endswith("/models/teachers/emoji64")
    assert rows == [
        ["parameters", "2.871 M", "11.12 M"],
        ["weights", "EMA", "one set, EMA or raw unsaid"],
        ["sha256", "80475362a8aa", "0170fe63894a"],
        ["seeds", "0 ... 65", "66 ... 131"],
    ]
    below = [line for line in lines if not line.startswith("|")]
    both = "both: kind model; arithmetic 32; size 64; rounding truncated, as ADM; images 66; steps 20"
    by = "agreement by: ldm_dkdm 0.2.0: dkdm evaluate -n 66 -c 2 --chains 1 --pairs 2 --seed 0"
    assert " ".join(" ".join(below).split()) == f"{both} {by}"


def test_what_is_not_as_usual_is_shown_and_one_set_has_one_column() -> None:
    facts = {**STUDENT, "guidance": 4.0, "eta": 1.0, "opened_from": "elsewhere/x.ckpt", "labels": list(range(60))}
    lines = "\n".join(measured_on(facts, None, 80)).splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in lines if line.startswith("|")}
    assert (rows["guidance"], rows["eta"], rows["opened_from"]) == ("4.0", "1.0", "elsewhere/x.ckpt")
    assert rows["labels"].startswith("0 1 2 ") and rows["labels"].endswith("...") and max(map(len, lines)) <= 80
    assert rows["images"] == "66" and "opened_from_sha256" not in rows


def test_the_files_keep_all_that_the_terminal_shortens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert toy("a.npz", "b.npz", "--metrics", "fd", "--save_statistics", "a_statistics.npz") == 0
    capsys.readouterr()
    assert toy("b.npz", "a_statistics.npz", "--metrics", "fd", "-o", "out.json") == 0
    printed = capsys.readouterr()
    hashed = record()["reference"]["sha256"]
    assert hashed not in printed.out and hashed[:12] in printed.out
    (row,) = [line for line in printed.out.splitlines() if line.startswith("| statistics of")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["", "a.npz"]
    assert record()["reference"]["statistics of"]["source"]["sha256"]
    assert max(len(line) for line in printed.out.splitlines() if "are reused" not in line) <= 80
    assert json.loads(Path("out.json").read_text())["warnings"] == [
        "samples and reference: 80 and 70 images are fewer than 10,000; fd depends on their number, kid does not"
    ]
    assert printed.err.count("not comparable") == 1


def test_warnings_of_two_sets_are_one() -> None:
    jpeg = {"images": 9, "lossy": 9}
    few, lossy = doubts(jpeg, jpeg, ["fid", "sfid"])
    assert few.startswith("samples and reference: 9 images each are fewer than 10,000; fid, sfid depend on")
    assert lossy.startswith("samples and reference: 9 files each are JPEG or lossy WebP")
    (alone,) = doubts({"images": 9}, {"images": 8}, ["is", "kid"])
    assert alone.startswith("samples: 9 images are fewer than 10,000; is depends on")
    few, lossy = doubts({"images": 20_000}, jpeg, ["fid"])
    (few_references,) = doubts({"images": 20_000}, {"images": 9}, ["fid", "is"])
    assert few_references.endswith("; fid depends on their number, kid does not")
    assert few.startswith("reference: 9 images are fewer") and lossy.startswith("reference: 9 files are JPEG")


def test_sets_of_another_width_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("wide.npz", np.concatenate([A, A], 2))
    asked = ("--metrics", "fd", "-o", "out.json")
    assert toy("wide.npz", "a.npz", *asked, "--save_statistics", "statistics.npz") == 0
    found = record()
    assert (found["samples"]["size"], found["reference"]["size"]) == ("64x32", 32)
    assert "the samples are 64x32, the reference 32x32; features see the resize" in capsys.readouterr().err
    assert toy("a.npz", "statistics.npz", *asked) == 0
    assert "the samples are 32x32, the reference 64x32; features see the resize" in capsys.readouterr().err
    assert toy("wide.npz", "a.npz", *asked, "--size", 32) == 2
    assert "--size: wide.npz holds images 64x32; an .npz is not resized" in capsys.readouterr().err
    assert TensorImages(torch.cat([A, A], 1)).facts()["size"] == "32x64"


def test_a_path_in_the_home_folder_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    assert [in_home("/home/a/b"), in_home("/home/ab"), in_home("c")] == ["~/b", "/home/ab", "c"]


def test_a_table_tells_runs_of_one_name_and_checkpoints_apart(tmp_path: Path) -> None:
    steps = {"1": "student/student.safetensors", "2": "checkpoints/step=00000004.ckpt"}
    for home in (tmp_path / "A/logs/run/student", tmp_path / "B/logs/run/student"):
        (home / "evaluations").mkdir(parents=True)
        (home / "config.yaml").write_text("network: {}\n")
        (home / "evaluation.json").write_text(json.dumps(FIGURES))
        for name, file in steps.items():
            samples = {"source": "run", "images": 9, "opened_from": f"logs/run/{file}"}
            record = {"figures": {"FID": 12.5}, "samples": samples, "reference": None, "features": []}
            text = json.dumps({**record, "warnings": [], "ldm_dkdm": "0.2.0"})
            (home / "evaluations" / f"alone-{name}.json").write_text(text)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in table([tmp_path / "A/logs/run"]).split("\n")
    ]
    own, saved = rows[2:4]
    place = rows[0].index("agreement")
    assert (own[0], saved[0]) == ("run/student", "run/student-step=00000004")
    assert (own[place], saved[place]) == ("0.25", "")  # the agreement is the student's
    both = table([tmp_path / "A/logs/run", tmp_path / "B/logs/run", tmp_path / "B/logs/run/student"])
    assert [both.count(f"| {letter}/logs/run/student ") for letter in "AB"] == [1, 2]
