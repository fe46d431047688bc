"""`dkdm evaluate -r RUN` and `--metrics agreement`: the training's figures, their provenance, what is said."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.evaluation import perceptual
from ldm_dkdm.evaluation.agreement import FIGURES
from ldm_dkdm.evaluation.json_files import write_json
from ldm_dkdm.evaluation.likeness import likeness
from ldm_dkdm.evaluation.results import append_row
from ldm_dkdm.reports.model_figures import read_figures
from tests.cli import distil, run_script, table, write_yaml
from tests.parts import distill_config

SMALL = ("--chains", 4, "--pairs", 3, "-c", 2)  # the sizes of `few_images`
LEAST = ("--chains", 1, "--pairs", 1, "-c", 1)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("ldm_dkdm.commands.evaluate.RESULTS", Path("results.csv"))


@pytest.fixture(scope="module")
def run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seed 5 that measured itself at its last step."""
    home = tmp_path_factory.mktemp("logs")
    config = distill_config(teacher_folder, home, trainer={"max_steps": 3, "seed": 5, "precision": "32"})
    config["logging"] |= {"evaluate_every": 3, "sample_every": 99}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm_dkdm.evaluation.agreement.TRAINING", dkdm.evaluation.agreement.Sizes(4, 3, 2))
        assert distil("--base", write_yaml(home / "base.yaml", config)) == 0
    return home / "run"


def evaluate(*arguments: object) -> int:
    return run_script("evaluate.py", *arguments)


def rows() -> list[dict[str, str]]:
    with Path("results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_gives_the_figures_that_the_training_logged(run: Path, teacher_folder: Path) -> None:
    logged = {name: float(text) for name, text in table(run / "metrics.csv")[-1].items() if text and name in FIGURES}
    assert {"agreement", "agreement_q1", "x0_drift", "psnr", "ssim"} <= set(logged) and logged["agreement"] > 0
    assert evaluate("-r", run, "-n", 0, *SMALL, "--seed", 5, "-o", "alone.json") == 0
    assert evaluate(run, teacher_folder, "--metrics", "agreement", *SMALL, "--seed", 5, "-o", "metric.json") == 0
    alone, metric = json.loads(Path("alone.json").read_text()), json.loads(Path("metric.json").read_text())
    for found in (alone, metric["figures"]):
        assert {name: found[name] for name in logged} == pytest.approx(logged, rel=1e-4)
        assert len(found["eps_mse_by_t"]) == 20
    assert evaluate("-r", run, "-n", 0, *SMALL, "--seed", 6, "-o", "other.json") == 0
    assert json.loads(Path("other.json").read_text())["agreement"] != pytest.approx(logged["agreement"], rel=1e-4)


def test_a_run_alone_has_a_row_of_results_with_the_facts_of_any_other(
    run: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("-r", run, "-n", 65, "--chains", 1, "--pairs", 1, "-c", 2) == 0
    printed = capsys.readouterr()
    (row,) = rows()
    figures = json.loads((run / "student" / "evaluation.json").read_text())
    assert float(row["agreement"]) == figures["agreement"]
    assert float(row["frechet_student_to_teacher"]) == figures["frechet_student_to_teacher"]
    student = run / "student" / "student.safetensors"
    facts = {"images": "65", "seeds": "0 ... 64", "sampler": "ddim", "steps": "2", "weights": "EMA"}
    facts |= {"opened_from": str(student), "opened_from_sha256": sha256(student), "extractor features": "pixels"}
    facts |= {"reference": str(teacher_folder), "reference seeds": "65 ... 129", "ldm_dkdm": dkdm.__version__}
    assert {name: row[name] for name in facts} == facts
    by = f"ldm_dkdm {dkdm.__version__}: dkdm evaluate -n 65 -c 2 --chains 1 --pairs 1 --seed 0"
    assert row["agreement by"] == figures["measured_with"] == by
    few = "samples and reference: 65 images each are fewer than 10,000; pixel-frechet"
    assert printed.err.count("are fewer than") == 1
    assert few in printed.err and few in row["warnings"] and few in figures["warnings"][0]
    assert figures["student_weights"] == "EMA" and figures["student_opened_from"] == str(student)
    assert "to do: 1 chain of the teacher through 20 steps, 197 images by DDIM in 2 steps" in printed.out
    calls = f"teacher {20 + 2 * (1 + 2 * 65):,}, student about {2 * 20 + 2 * (1 + 65):,}"
    assert calls in printed.out and printed.out.index("to do:") < printed.out.index("frechet_student_to_teacher")


def test_the_same_row_is_not_added_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert evaluate("-r", run, "-n", 0, *LEAST) == 0
    assert len(rows()) == 1 and "results.csv: holds this row already" in capsys.readouterr().out
    assert evaluate("-r", run, "-n", 0, *LEAST, "--seed", 1) == 0
    assert len(rows()) == 2


def test_figures_of_other_settings_are_kept_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = run / "student"
    assert evaluate("-r", run, "-n", 65, *LEAST) == 0
    first = json.loads((student / "evaluation.json").read_text())
    assert first["student_images_per_second"] > 0
    capsys.readouterr()
    assert evaluate("-r", run, "-n", 65, *LEAST) == 0  # reuses the statistics: no speeds
    assert "before" not in capsys.readouterr().out and len(rows()) == 1
    assert json.loads((student / "evaluation.json").read_text()) == first
    earlier = student / "evaluations" / "earlier"
    before = set(earlier.glob("*")) if earlier.exists() else set()
    assert evaluate("-r", run, "-n", 0, *LEAST) == 0
    (kept,) = set(earlier.glob("*")) - before
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "before" in line]
    assert line == f"{kept}: the figures that were there before ({first['measured_with']})"
    assert json.loads(kept.read_text()) == first
    now = json.loads((student / "evaluation.json").read_text())
    assert "frechet_student_to_teacher" not in now and now["agreement"] == first["agreement"]
    assert read_figures([student])[0].values["agreement"] == f"{now['agreement']:.6g}"  # a report shows the new ones
    assert evaluate("-r", run, "-n", 0, *LEAST, "--seed", 9, "-o", student / "evaluation.json") == 0
    assert "before" not in capsys.readouterr().out  # a file of one's own choice


def printed_table(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The rows of a Markdown table on stdout, as column -> cell."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(head, own, strict=True)) for own in cells]


def test_figures_of_predictions_that_overflow_are_not_written(
    run: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = load_model(run)
    torch.nn.init.constant_(student.network.out[2].bias, 3e38)
    student.save("wild")
    assert evaluate("-r", "wild", "--teacher", teacher_folder, "-n", 0, *SMALL) == 2
    assert "wild: its predictions are not finite (t = " in capsys.readouterr().err
    assert not Path("wild/evaluation.json").exists() and not Path("results.csv").exists()


def test_figures_in_json_are_numbers(tmp_path: Path) -> None:
    """Figures of older versions may be NaN, which is not JSON."""
    write_json(tmp_path / "a.json", {"figures": {"FD": math.nan, "IS": 2.0}, "list": [1, math.inf], "n": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"figures": {"IS": 2.0}, "list": [1], "n": None}


def test_a_table_shows_what_r_alone_has_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-r", run, "-n", 65, *LEAST) == 0
    figures = json.loads((run / "student" / "evaluation.json").read_text())
    capsys.readouterr()
    assert evaluate(run, "--table") == 0
    (row,) = printed_table(capsys)
    for name in ("agreement", "x0_drift", "psnr", "ssim", "frechet_student_to_teacher", "frechet_teacher_to_teacher"):
        assert row[name] == f"{figures[name]:.5g}", name
    assert row["agreement by"] == "-n 65 -c 1 --chains 1 --pairs 1 --seed 0"
    assert not {"student_gflops", "agreement_q1", "untrained_q1", "student_images_per_second"} & row.keys()
    assert evaluate(run, "--metrics", "agreement", "--chains", 2, "--pairs", 1, "-c", 1) == 0  # a record of its own
    capsys.readouterr()
    assert evaluate(run, "--table") == 0
    record, alone = printed_table(capsys)
    assert alone == {**dict.fromkeys(alone, ""), **row}
    assert "--chains 2" in record["agreement by"] and record["agreement"] != row["agreement"]
    assert record["parameters"] == row["parameters"] and not record["frechet_student_to_teacher"]
    shutil.rmtree(run / "student" / "evaluations")


def test_rows_that_differ_in_their_date_or_speeds_alone_are_one(tmp_path: Path) -> None:
    row = {"date": "1", "samples": "a", "FID": 0.1, "labels": None, "teacher_images_per_second": 3.5}
    assert append_row(tmp_path / "r.csv", row) and not append_row(tmp_path / "r.csv", {**row, "date": "2"})
    assert not append_row(tmp_path / "r.csv", {**row, "teacher_images_per_second": 3.6})
    assert append_row(tmp_path / "r.csv", {**row, "student_images_per_second": 2.0})  # a speed that no row has
    assert append_row(tmp_path / "r.csv", {**row, "KID": 0.0}) and append_row(tmp_path / "r.csv", {**row, "FID": 0.2})
    assert not append_row(tmp_path / "r.csv", {**row, "date": "3"})  # in a file with more columns by now


def test_every_long_part_shows_its_progress(teacher_folder: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    teacher = load_model(teacher_folder)
    student = teacher.student(teacher.node)
    dkdm.evaluate(
        student, teacher, images=65, chains=2, pairs=3, steps=1, progress=lambda w, d, t: seen.update({w: (d, t)})
    )
    chains, pairs, states, random = list(seen)[:4]
    assert ("chains" in chains, "same noise" in pairs, "student" in states, "random" in random) == (True,) * 4
    again = f"features of {teacher.path} with the student's seeds"
    drawn = [f"components of {teacher.path}", f"features of {teacher.path}", again, "features of student"]
    assert list(seen)[4:] == drawn
    totals = [20, 3, 40, 40, 65, 65, 65, 65]
    assert list(seen.values()) == [(total, total) for total in totals]


def test_which_weights_were_loaded_is_a_fact(run: Path, teacher_folder: Path) -> None:
    file = run / "checkpoints" / "step=00000003.ckpt"
    models = [load_model(path, **hints) for path, hints in ((run, {}), (file, {}), (file, {"use_ema": False}))]
    kinds = [dkdm.measure(m, m, metrics=["agreement"], chains=1, pairs=1, steps=1).samples["weights"] for m in models]
    assert kinds == ["EMA", "EMA", "raw"]
    assert "weights_kind: EMA" in (run / "student" / "config.yaml").read_text()
    assert "**weights kind**: EMA" in (run / "student" / "README.md").read_text()
    models[2].save(run.parent / "saved")
    assert load_model(run.parent / "saved").info["weights_kind"] == "raw"
    assert "weights_kind" not in load_model(teacher_folder).info  # its card does not say


# LPIPS


class Fake(nn.Module):
    """In place of LPIPS: the mean distance of two images in [-1,1]."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape and a.shape[1] == 3
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_are_given_to_lpips_as_rgb_in_its_range(channels: int) -> None:
    white, black = (torch.full((9, 16, 16, channels), value, dtype=torch.uint8) for value in (255, 0))
    figures = likeness(white, black, Fake())
    assert figures["lpips"].tolist() == [2.0] * 9 and figures["psnr"].tolist() == [0.0] * 9
    assert "lpips" not in likeness(white[:, :15], black[:, :15], Fake()) and "lpips" not in likeness(white, black)
    assert "ssim" not in likeness(white[:, :5], black[:, :5])


def models(folder: Path) -> tuple[DiffusionModel, DiffusionModel]:
    teacher = load_model(folder)
    return teacher.student(teacher.node), teacher


def test_lpips_is_measured_where_its_weights_are(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    monkeypatch.setattr(perceptual, "VGG16", replace(perceptual.VGG16, sha256=sha256(tmp_path / "vgg.pth")))
    monkeypatch.setattr(perceptual, "lpips_loss", lambda path: Fake())
    asked = {"chains": 1, "pairs": 3, "steps": 2}
    student, teacher = models(teacher_folder)
    given = dkdm.evaluate(student, teacher, images=0, lpips=tmp_path / "vgg.pth", **asked)
    seed = dkdm.evaluation.agreement.seed_of(0, 0, 0, "evaluation")
    ours, theirs = (m.sample(3, steps=2, seed=seed).double() / 127.5 for m in (student, teacher))
    assert given["lpips"] == pytest.approx((ours - theirs).abs().mean().item(), rel=1e-4) and given["lpips"] > 0
    place = tmp_path / "torch" / "hub" / "checkpoints" / perceptual.VGG16.name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    found = dkdm.measure(student, teacher, metrics=["agreement"], **asked)
    assert found.figures["lpips"] == given["lpips"] and found.features[0]["features"] == "vgg16 of LPIPS"


def test_a_line_says_where_the_weights_of_lpips_belong(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("-r", run, "-n", 0, *LEAST) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "LPIPS" in line]
    file = f"vgg16-397923af.pth (553.4 MB, SHA-256 {perceptual.VGG16.sha256})"
    place = tmp_path / "torch" / "hub" / "checkpoints"
    assert lines == [f"no LPIPS: put {file} in {place}, or give its path"] and not rows()[0].get("lpips")
    both = ("--metrics", "agreement", "reconstruction", "-n", 2, *LEAST)
    assert evaluate(run, *both) == 0
    assert capsys.readouterr().out.count("no LPIPS: ") == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluate("-r", run, "-n", 0, *LEAST) == 0
    assert " in ~/torch/hub/checkpoints, or" in capsys.readouterr().out
    assert evaluate("-r", run, "-n", 0, *LEAST, "--lpips", "nowhere") == 2
    assert "--lpips: nowhere: no such file; it should hold vgg16-397923af.pth" in capsys.readouterr().err
    image = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="lpips: has no effect; agreement and reconstruction measure LPIPS"):
        dkdm.measure(image, image, metrics=["pixel-frechet"], lpips="x")
