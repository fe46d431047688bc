"""dkdm evaluate SAMPLES [REFERENCE]: figures, provenance, warnings, results and tables, as a user sees them."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import ldm_dkdm as dkdm
from ldm_dkdm import UserError
from ldm_dkdm.checkpoints.card import sha256
from tests.cli import contents, distil, write_yaml
from tests.evaluate_sets import (
    A,
    B,
    evaluate,
    evaluation_home,  # noqa: F401 (a fixture)
    record,
    results,
    toy,
    write_images,
)
from tests.feature_sets import Toy
from tests.parts import distill_config


@pytest.fixture(scope="module")
def run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("logs")
    config = distill_config(teacher_folder, home, trainer={"max_steps": 2})
    assert distil("--base", write_yaml(home / "base.yaml", config)) == 0
    return home / "run"


# Images


def test_two_sets_are_measured_printed_and_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("a.npz", "b.npz", "-o", "out.json", "--batch_size", 16) == 0
    printed, found = capsys.readouterr().out, record()
    mean = [Toy()(x.movedim(-1, 1)).pooled.double().numpy() for x in (A, B)]
    lower = ((mean[0].mean(0) - mean[1].mean(0)) ** 2).sum()
    assert found["figures"]["FD-toy"] > lower and "FD-toy" in printed and "KID-toy" in printed
    assert set(found["figures"]) == {"FD-toy", "KID-toy", "KID-toy std", "precision-toy", "recall-toy"}
    assert (
        found["samples"] | {"source": "a.npz", "images": 70, "size": 32, "sha256": sha256(Path("a.npz"))}
        == (found["samples"])
    )
    assert found["reference"]["sha256"] == sha256(Path("b.npz")) and found["ldm_dkdm"] == dkdm.__version__
    assert found["features"] == [
        {"features": "toy", "weights_sha256": sha256(Path(__file__).parent / "feature_sets.py"), "resize": "none"}
    ]
    (row,) = results()
    assert float(row["FD-toy"]) == found["figures"]["FD-toy"]
    assert (row["samples"], row["reference"], row["images"], row["reference images"]) == ("a.npz", "b.npz", "70", "80")


def test_rows_are_added_and_new_figures_make_columns() -> None:
    assert toy("a.npz", "b.npz", "--metrics", "fd") == 0
    assert toy("a.npz", "b.npz", "--metrics", "pixel-frechet", "kid") == 0
    first, second = results()
    assert first["FD-toy"] and not first["KID-toy"] and second["KID-toy"] and second["pixel Frechet"]
    assert toy("a.npz", "b.npz", "--metrics", "fd", "--results", "other.csv") == 0
    assert len(results()) == 2 and len(Path("other.csv").read_text().splitlines()) == 2


def test_the_pixel_distance_is_that_of_the_tensors() -> None:
    from ldm_dkdm.evaluation.frechet import pixel_frechet_distance

    assert evaluate("a.npz", "b.npz", "--metrics", "pixel-frechet", "-o", "out.json") == 0
    assert record()["figures"] == {"pixel Frechet": pytest.approx(pixel_frechet_distance(B, A), rel=1e-9)}


def test_saved_statistics_take_the_place_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("a.npz", "b.npz", "--metrics", "fd", "-o", "images.json") == 0
    assert toy("b.npz", "a.npz", "--metrics", "fd", "--save_statistics", "b_statistics.npz") == 0
    assert toy("a.npz", "b_statistics.npz", "--metrics", "fd", "-o", "statistics.json") == 0
    found, wanted = record("statistics.json"), record("images.json")
    assert found["figures"] == pytest.approx(wanted["figures"], abs=1e-9)
    assert found["reference"]["images in statistics"] == 80
    assert found["reference"]["statistics of"]["source"]["sha256"] == sha256(Path("b.npz"))
    capsys.readouterr()
    seen = Toy.seen
    assert toy("a.npz", "b_statistics.npz", "--metrics", "kid") == 2 and Toy.seen == seen
    assert "not features one by one, which precision-recall and KID need" in capsys.readouterr().err


def test_doubts_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    Path("jpeg").mkdir()
    for i, image in enumerate(A[:10].numpy()):
        Image.fromarray(image[:16, :16]).save(f"jpeg/{i}.jpg")
    assert toy("jpeg", "b.npz", "-o", "out.json") == 0
    errors = capsys.readouterr().err
    for part in (
        "samples and reference: 10 and 80 images are fewer than 10,000; fd, precision-recall depend on",
        "samples: 10 files are JPEG or lossy WebP",
        "the samples are 16x16, the reference 32x32",
    ):
        assert part in errors and any(part in warning for warning in record()["warnings"])
    assert toy("a.npz", "b.npz", "--metrics", "kid") == 0
    assert "not comparable" not in capsys.readouterr().err


# Models


def test_a_model_is_sampled_with_other_seeds_than_its_reference(teacher_folder: Path) -> None:
    asked = ("-n", 12, "-c", 2, "--metrics", "fd", "-o", "out.json")
    assert toy(teacher_folder, teacher_folder, *asked) == 0
    found = record()
    assert (found["samples"]["seeds"], found["reference"]["seeds"]) == ("0 ... 11", "12 ... 23")
    assert found["samples"]["sampler"] == "ddim" and found["samples"]["steps"] == 2 and found["figures"]["FD-toy"] > 0
    assert found["samples"]["opened_from_sha256"] == sha256(teacher_folder / "model.safetensors")
    assert toy(teacher_folder, teacher_folder, *asked, "--seed", 12, "--reference_seed", 12) == 0
    assert record()["figures"]["FD-toy"] == pytest.approx(0, abs=1e-6)


def test_a_runs_reference_is_its_teacher_and_its_figures_stay_with_it(
    run: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("-n", 12, "-c", 2)
    assert toy(run, *asked, "--metrics", "fd") == 0
    assert f"REFERENCE: {teacher_folder}, the teacher of {run}" in capsys.readouterr().out
    assert toy("-r", run, *asked, "--metrics", "kid", "precision-recall") == 0
    (file,) = (run / "student" / "evaluations").glob("*.json")
    found = record(file)
    assert {"FD-toy", "KID-toy", "recall-toy"} <= set(found["figures"])
    assert found["reference"]["source"] == str(teacher_folder) and found["samples"]["parameters"] > 0
    assert toy(run, "b.npz", *asked, "--metrics", "fd") == 0
    assert evaluate("-r", run, "-n", 0, "--chains", 1, "--pairs", 1, "-c", 1) == 0
    capsys.readouterr()
    assert evaluate(run, "--table") == 0
    head, line, *rows, _, same, blank, prime = capsys.readouterr().out.splitlines()
    assert not blank and prime.startswith("A prime (FID') marks a figure against samples of a model, the teacher")
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert columns[:4] == ["model", "parameters", "GFLOPs", "reference"]
    assert set(line) <= set("|- ")
    assert {"FD-toy'", "FD-toy", "KID-toy'", "eps error by quarter of t"} <= set(columns) and len(rows) == 2
    assert all("run/student" in row for row in rows)
    assert same == "images 12, sampler ddim 2, agreement by -n 0 -c 1 --chains 1 --pairs 1 --seed 0"


def test_a_table_of_runs_names_those_without_figures(
    run: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"  # another test may have evaluated the teacher
    shutil.copytree(teacher_folder, new, ignore=shutil.ignore_patterns("evaluation*"))
    assert evaluate("-r", run, "-n", 0, "--chains", 1, "--pairs", 1, "-c", 1) == 0
    capsys.readouterr()
    assert evaluate(run, new, "--table") == 0
    assert f"{new}: has not been evaluated; dkdm evaluate {new} REFERENCE" in capsys.readouterr().out
    assert evaluate(new, "--table") == 2
    assert evaluate(run, "nowhere", "--table") == 2
    assert "nowhere: no such run, model or JSON file of an evaluation" in capsys.readouterr().err


def test_agreement_refuses_a_number_of_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run, "--metrics", "agreement", "-n", 100) == 2
    assert "--n_samples: has no effect; no model is sampled for it" in capsys.readouterr().err


def test_agreement_equals_the_measurement_without_data(run: Path) -> None:
    assert evaluate(run, "--metrics", "agreement", "--chains", 2, "-o", "out.json") == 0
    assert evaluate("-r", run, "-n", 0, "--chains", 2, "-o", "plain.json") == 0
    plain = record("plain.json")
    assert record()["figures"]["eps_mse_by_t"] == plain["eps_mse_by_t"]
    assert plain["student_sha256"] == record()["samples"]["sha256"] != plain["teacher_sha256"]
    assert plain["teacher_sha256"] == record()["reference"]["sha256"] and plain["ldm_dkdm"] == dkdm.__version__
    assert plain["precision"] == "32" and "sampler" not in plain
    assert plain["measured_with"].endswith("dkdm evaluate -n 0 -c 20 --chains 2 --pairs 16 --seed 0")


def test_nothing_is_written_into_models_that_are_not_runs(teacher_folder: Path) -> None:
    before = contents(teacher_folder)
    assert toy(teacher_folder, "b.npz", "-n", 5, "-c", 2, "--metrics", "fd") == 0
    assert contents(teacher_folder) == before


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "SAMPLES: name a model, a folder of images or an .npz"),
        (["a.npz", "b.npz", "a.npz"], "'a.npz': one argument too many"),
        (["a.npz"], "REFERENCE: fd, precision-recall, kid compare with a second set of images; name it"),
        (["a.npz", "--metrics", "kid"], "REFERENCE: kid compares with a second set of images; name it"),
        (["a.npz", "b.npz", "--metrics", "fidd"], "invalid choice: 'fidd'"),
        (["a.npz", "b.npz", "--metrics", "fid"], "--features: weights-inception-2015-12-05-6726825d.pth is missing"),
        (["a.npz", "b.npz", "--metrics", "fd-dinov2"], "--features: dinov2_vitl14_pretrain.pth is missing"),
        (["a.npz", "b.npz", "--metrics", "agreement"], "agreement compares two models, not images"),
        (["a.npz", "b.npz", "--metrics", "reconstruction"], "reconstruction measures a first stage"),
        (["a.npz", "b.npz", "--metrics", "fd", "agreement"], "agreement compares two models, not images"),
        (["a.npz", "b.npz", "--metrics", "fd", "reconstruction"], "reconstruction measures a first stage"),
        (["a.npz", "b.npz", "--size", "16"], "--size: b.npz holds images of side 32"),
        (["a.npz", "b.npz", "image_size=3"], "image_size: no model uses this hint"),
        (["a.npz", "b.npz", "--batch_size", "0"], "--batch_size: must be at least 1"),
        (["a.npz", "b.npz", "--teacher", "/nowhere"], "--teacher: has no effect; REFERENCE is b.npz"),
        (["a.npz", "b.npz", "--labels", "7"], "--labels: has no effect"),
        (["a.npz", "b.npz", "--chains", "-4"], "--chains: must be at least 1"),
        (["a.npz", "b.npz", "--chains", "3"], "--chains: has no effect; it is an option of agreement"),
        (["a.npz", "b.npz", "--pairs", "16"], "--pairs: has no effect; it is an option of agreement"),
        (["a.npz", "b.npz", "--processes", "-2"], "--processes: must be at least 1"),
        (["a.npz", "b.npz", "-n", "5"], "--n_samples: has no effect"),
        (["nowhere", "b.npz"], "nowhere: no such file or folder; SAMPLES is a model, a folder of images, an .npz of"),
        (["a.npz", "nowhere"], "nowhere: no such file or folder; REFERENCE is a model, a folder of images, an .npz of"),
        (["-r", "nowhere", "--sampler", "ddpm"], "--sampler: has no effect with -r alone; add --metrics"),
        (
            ["a.npz", "b.npz", "--save_statistics", "a.txt"],
            "--save_statistics: statistics are an .npz, a.txt is not",
        ),
        (["a.npz", "b.npz", "--save_statistics", "b.npz"], "--save_statistics: b.npz is read by this call"),
        (["a.npz", "a.npz", "--save_statistics", "b.npz"], "--save_statistics: b.npz exists and does not hold"),
        (["a.npz", "b.npz", "--save_statistics", "b.npz/c.npz"], "b.npz/c.npz: cannot be written; "),
        (["a.npz", "b.npz", "-o", "b.npz/c.json"], "b.npz/c.json: cannot be written; "),
        (["a.npz", "b.npz", "--results", "b.npz/c.csv"], "b.npz/c.csv: cannot be written; "),
        (
            ["a.npz", "b.npz", "--save_statistics", "c.npz", "--metrics", "is", "fd"],
            "--save_statistics: a file holds statistics of one extractor, the metrics need inception, toy",
        ),
        (
            ["a.npz", "b.npz", "--save_statistics", "c.npz", "--metrics", "pixel-frechet"],
            "--save_statistics: pixel components have no statistics",
        ),
        (["a.npz", "b.npz", "--features", "pixels", "--metrics", "fd"], "pixel-frechet is the distance on pixels"),
        (["--table"], "--table: name the runs"),
        (["a.json", "--table"], "a.json"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (evaluate if {"pixels", "--table"} & {*arguments} else toy)(*arguments) == 2 and Toy.seen == 0
    error = capsys.readouterr().err
    assert reason in error and len(error.strip().splitlines()) == 1
    assert not Path("logs").exists()


@pytest.mark.parametrize(
    ("metric", "package"), [("kid", "torch_fidelity.metric_kid"), ("reconstruction", "kornia.metrics")]
)
def test_packages_that_are_not_installed_are_named(
    metric: str, package: str, first_stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert toy(first_stage, "b.npz", "--metrics", metric) == 2
    error = capsys.readouterr().err
    assert f"--metrics: {metric} needs the package {package}; pip install 'ldm-dkdm[evaluation]'" in error


@pytest.mark.parametrize("place", ["samples", "reference"])
def test_files_that_are_not_images_and_huge_ones_are_named(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images("good", A[:3])
    write_images("bad", B[:3])
    sets = ("bad", "good") if place == "samples" else ("good", "bad")
    Path("bad/x.png").touch()
    assert toy(*sets, "--metrics", "fd") == 2
    assert "error: bad/x.png: not a readable image: cannot identify image file" in capsys.readouterr().err
    Image.new("L", (64, 64)).save("bad/x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # Pillow raises above twice as many
    assert toy(*sets, "--metrics", "fd") == 2
    assert "error: bad/x.png: has too many pixels to be read safely; scale it down" in capsys.readouterr().err


def test_results_that_are_not_csv_are_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.csv").write_text('a,b\n1,2,3,"\n')
    assert toy("a.npz", "b.npz", "--metrics", "fd", "--results", "notes.csv") == 2
    assert "notes.csv: is not a CSV file of results" in capsys.readouterr().err
    assert Path("notes.csv").read_text() == 'a,b\n1,2,3,"\n'


# Python


def test_measure_takes_tensors_models_and_paths(teacher_folder: Path) -> None:
    teacher = dkdm.load_model(teacher_folder)
    found = dkdm.measure(teacher, B, features="toy", metrics=["fd", "kid"], count=6, steps=2)
    again = dkdm.measure(teacher.sample(6, steps=2), Path("b.npz"), features="toy", metrics=["fd", "kid"])
    assert found.figures == pytest.approx(again.figures, abs=1e-9)
    assert found.statistics["toy"].count == 6 and found.reference["kind"] == "tensor"
    with pytest.raises(UserError, match="metrics: 'fidd' is not one of fid, sfid"):
        dkdm.measure(A, B, metrics=["fidd"])
    with pytest.raises(UserError, match="count: must be at least 1, got 0"):
        dkdm.measure(teacher, B, features="toy", count=0)
    with pytest.raises(UserError, match="chains: has no effect; it is an option of agreement"):
        dkdm.measure(A, B, features="toy", chains=32)
    with pytest.raises(UserError, match=r"size: has no effect; .* neither set is a folder"):
        dkdm.measure(teacher, B, features="toy", size=16)
