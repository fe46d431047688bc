"""The files that dkdm evaluate writes: statistics that remember their images, rows of several processes."""

import shutil
import sys
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.evaluation.features import open_extractor
from ldm_dkdm.evaluation.gathering import gather
from ldm_dkdm.evaluation.metrics import METRICS
from ldm_dkdm.evaluation.opening import is_model
from ldm_dkdm.evaluation.results import append_row, read_rows
from ldm_dkdm.evaluation.sources import TensorImages
from ldm_dkdm.evaluation.statistics import Statistics
from ldm_dkdm.files import write_tensors
from ldm_dkdm.images import save_image, to_image
from tests.evaluate_sets import A, evaluate, evaluation_home, record, results, toy, write_images  # noqa: F401 (a fixture)
from tests.prepared import FORKS, begin, ended


def test_saved_statistics_remember_that_files_were_jpeg_and_resized(capsys: pytest.CaptureFixture[str]) -> None:
    Path("jpeg").mkdir()
    for i, image in enumerate(A[:10].numpy()):
        Image.fromarray(image[:, :24]).save(f"jpeg/{i}.png", format="JPEG")  # whatever its name is
    asked = ("--metrics", "fd", "--save_statistics", "jpeg.npz", "--size", 32)
    assert toy("jpeg", "b.npz", *asked) == 0
    assert toy("a.npz", "jpeg.npz", "--metrics", "fd") == 0
    first, second = results()
    resized = "centred square to 32, Lanczos"
    assert (first["resized"], first["reference resized"]) == (resized, "") and second["reference resized"] == resized
    errors = capsys.readouterr().err
    for part in (
        "samples: 10 files are JPEG",
        "reference: 10 files are JPEG",
        "samples centred square to 32, Lanczos; reference none",
        "samples none; reference centred square to 32, Lanczos",
    ):
        assert part in errors


def test_saved_statistics_are_written_over_by_statistics_only() -> None:
    asked = ("--metrics", "fd", "--save_statistics", "statistics.npz")
    assert toy("a.npz", "b.npz", *asked) == 0 == toy("b.npz", "a.npz", *asked)
    assert Statistics.read(Path("statistics.npz")).count == 80


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (
            ("large", "small"),
            "the images of large are 32x32 RGB, those of small 16x16 RGB; --size (in Python",
        ),
        (("a.npz", "small"), "the images of a.npz are 32x32 RGB, those of small 16x16 RGB; --size"),
        (("large", "four.npz"), "the images of large are 32x32 RGB, those of four.npz 32x32 of 4 channels\n"),
        (("few", "large"), "pixel-frechet needs 65 images or more in both sets; few has 3, large has 66"),
        (("large", "few"), "pixel-frechet needs 65 images or more in both sets; large has 66, few has 3"),
        (("model", "small", "-n", 66, "-c", 2), "the images of model are 32x32 RGB, those of small 16x16 RGB; --size"),
        (("model", "large", "-n", 6, "-c", 2), "needs 65 images or more in both sets; model has 6, large has 66"),
    ],
)
def test_sets_that_a_metric_cannot_compare_are_refused_before_they_are_read(
    sets: tuple, reason: str, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, images in {"large": A[:66], "small": A[:66, :16, :16], "few": A[:3]}.items():
        write_images(name, images)
    np.savez("four.npz", A[:66][..., [0, 1, 2, 0]].numpy())
    Path("model").symlink_to(teacher_folder)
    assert evaluate(*sets, "--features", "pixels") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --metrics: pixel-frechet ") and reason in error and error.count("\n") == 1
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("reference", "metric", "reason"),
    [
        ("mixed", "fd", "--size: mixed/z.png is not 32x32 as the first image; give a size"),
        ("damaged", "fd", "damaged/z.png: not a readable image"),
        ("grey", "reconstruction", "SAMPLES: the first stage takes 3 channels"),
        ("part.npz", "sfid", "--metrics: sfid needs mu_s and sigma_s, which the statistics in part.npz lack; give its"),
        ("b.npz", "kid", "--metrics: kid needs the package torch_fidelity.metric_kid; pip install"),
        ("other", "agreement", "noise schedule: "),
    ],
)
def test_what_a_metric_cannot_take_is_refused_before_a_model_is_sampled(
    reference: str, metric: str, reason: str, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(METRICS, "sfid", replace(METRICS["sfid"], features="toy"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_kid", None)
    for name in ("mixed", "damaged"):
        write_images(name, A[:5])
    write_images("grey", A[:5, ..., :1])
    Image.new("RGB", (8, 8)).save("mixed/z.png")
    Path("damaged/z.png").write_text("no image")
    statistics = gather(TensorImages(A), {"toy": open_extractor("toy")}, set())["toy"]
    replace(statistics, mu_s=None, sigma_s=None).write(Path("part.npz"))
    model = load_model(teacher_folder)
    model.changed(schedule=NoiseSchedule(num_timesteps=10)).save("other")
    monkeypatch.setattr(DiffusionModel, "sample_batches", lambda *_: 1 / 0)
    capsys.readouterr()
    assert toy(teacher_folder, reference, "--metrics", "fd", metric, "-n", 4, "-c", 1) == 2
    error = capsys.readouterr().err
    assert reason in error and len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


def test_pixels_of_grey_images_are_repeated_to_rgb_where_the_others_are(capsys: pytest.CaptureFixture[str]) -> None:
    grey, others = A[..., :1].contiguous(), torch.flip(A, [0]) // 2
    write_images("grey", grey)
    np.savez("rgb.npz", grey.expand(-1, -1, -1, 3).numpy())
    np.savez("others.npz", others.numpy())
    asked = ("--features", "pixels", "--metrics", "pixel-frechet", "kid", "-o", "out.json")
    found = {}
    for samples, reference in (
        ("grey", "others.npz"),
        ("rgb.npz", "others.npz"),
        ("others.npz", "grey"),
        ("others.npz", "rgb.npz"),
    ):
        assert evaluate(samples, reference, *asked) == 0
        figures = {name: value for name, value in record()["figures"].items() if not name.endswith("std")}
        found[samples, reference] = figures
        said = "the grey images are repeated to RGB" in capsys.readouterr().out
        assert said == ("grey" in (samples, reference))
    assert found["grey", "others.npz"] == pytest.approx(found["rgb.npz", "others.npz"])
    assert found["others.npz", "grey"] == pytest.approx(found["others.npz", "rgb.npz"])
    assert evaluate("grey", "rgb.npz", *asked) == 0
    assert record()["figures"]["pixel Frechet"] == pytest.approx(0, abs=1e-6)


def append_rows(number: int, both: Barrier) -> None:
    """Ten rows of a process, with a figure of its own, once the other has begun."""
    both.wait(60)
    for i in range(10):
        append_row(Path("rows.csv"), {"samples": f"{number}.{i}", f"figure {number}": i})


def test_processes_that_append_rows_at_once_lose_none() -> None:
    both = FORKS.Barrier(2)
    processes = [begin(append_rows, number, both) for number in range(2)]
    assert [ended(process, 60) for process in processes] == [0, 0]
    rows = read_rows(Path("rows.csv"))
    assert sorted(row["samples"] for row in rows) == sorted(f"{n}.{i}" for n in range(2) for i in range(10))
    assert all(row[f"figure {row['samples'][0]}"] == row["samples"][2] for row in rows)


def test_a_table_is_written_too_and_takes_nothing_that_it_has_no_use_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("a.npz", "b.npz", "--metrics", "fd", "-o", "out.json") == 0
    capsys.readouterr()
    assert evaluate("out.json", "--table", "-o", "t.md") == 0
    printed, written = capsys.readouterr().out, Path("t.md").read_text()
    assert printed == f"{written}\nt.md: the table\n" and "| a.npz " in written and "FD-toy" in written
    for name, *values in (
        ("--metrics", "fid"),
        ("--seed", 5),
        ("--results", "r.csv"),
        ("--first_stage", "x"),
        ("image_size=4",),
    ):
        assert evaluate("out.json", "--table", "-o", "t.md", name, *values) == 2
        assert f"error: {name}: has no effect with --table" in capsys.readouterr().err
    assert evaluate("out.json", "--table", "-o", "a.npz/t.md") == 2
    assert "--out: a.npz/t.md: cannot be written; " in capsys.readouterr().err


def test_latents_beside_samples_do_not_make_them_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    write_images("out/img", A)
    save_image(to_image(A[0]), Path("out/grid.png"))
    write_tensors(Path("out/latents.safetensors"), {"latents": torch.zeros(2, 3, 8, 8)})
    assert toy("out", "b.npz", "--metrics", "fd") == 0
    shutil.rmtree("out/img")
    assert toy("out", "b.npz", "--metrics", "fd") == 2
    assert "out: " in (error := capsys.readouterr().err.splitlines()[-1]) and "model" not in error


def test_files_beside_images_do_not_make_them_a_model(teacher_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images("folder/class", A)
    torch.save({"labels": torch.zeros(2)}, "folder/labels.pt")
    Path("folder/config.json").write_text('{"dataset": "x"}')
    Path("folder/config.yaml").write_text("name: x\n")
    assert toy("folder", "b.npz", "--metrics", "fd") == 0
    assert "folder: 70 images; 3 other files are not read (" in capsys.readouterr().err
    torch.save({"labels": torch.zeros(2)}, "folder/model.ckpt")
    assert toy("folder", "b.npz", "--metrics", "fd") == 2
    both = "folder: holds images and model.ckpt, without a config that describes a model; name a folder with the images"
    assert both in capsys.readouterr().err
    shutil.copytree(teacher_folder, "model")
    write_images("model/previews", A[:2])
    assert is_model(Path("model")) and not is_model(Path("folder/class"))
    Path("folder/model.ckpt").unlink()
    for text in ("model:\n  name: unet\n", "weights: imagenet\n", "trainer: {}\n"):  # as other programs write them
        Path("folder/config.yaml").write_text(text)
        Path("folder/labels.pt").unlink(missing_ok=True)
        assert not is_model(Path("folder"))
    for text in ("model:\n  target: a.B\n", "trainer: {}\nlogging: {}\n"):
        Path("folder/config.yaml").write_text(text)
        assert is_model(Path("folder"))
    write_images("few", A[:2])
    for name, size in {"256x256_diffusion.safetensors": 9, "mine.ckpt": (1 << 20) + 1}.items():
        Path("few", name).write_bytes(bytes(size))
        with pytest.raises(UserError, match=f"^few: holds images and {name}, .* or few/{name} for the model"):
            is_model(Path("few"))
        Path("few", name).unlink()
    Path("folder/config.yaml").unlink()
    Path("folder/clip.pt").write_bytes(bytes((1 << 20) + 1))
    assert not is_model(Path("folder"))  # 70 images
    Path("pipeline").mkdir()
    Path("pipeline/model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    write_images("pipeline", A[:2])
    assert is_model(Path("pipeline"))
