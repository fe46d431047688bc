"""dkdm evaluate FIRST_STAGE IMAGES: the figures of reconstructions, and images that a first stage does not take."""

import shutil
from pathlib import Path

import pytest

import ldm_dkdm as dkdm
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from tests.evaluate_sets import B, evaluate, evaluation_home, record, toy, write_images  # noqa: F401 (a fixture)
from tests.parts import first_stage_folder


def test_a_first_stage_reconstructs_the_reference(first_stage: Path) -> None:
    assert toy(first_stage, "b.npz", "--metrics", "reconstruction", "fd", "-o", "out.json") == 0
    codec = FirstStageSource(first_stage).codec()
    latents = codec.encode(B)
    again = codec.decode(latents)
    error = ((B.double() - again.double()) / 255).square().flatten(1).mean(1)
    codes = codec.autoencoder.quantise(latents / codec.scale_factor)[2].unique()
    figures = record()["figures"]
    assert figures["PSNR"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-6)
    assert figures["codes in use"] == pytest.approx(len(codes) / 64)
    assert 1 <= figures["code perplexity"] <= len(codes) and -1 <= figures["SSIM"] < 1 and "LPIPS" not in figures
    assert figures["FD-toy"] == pytest.approx(dkdm.measure(again, B, features="toy", metrics=["fd"]).figures["FD-toy"])


@pytest.mark.parametrize("metric", ["fd", "reconstruction"])
@pytest.mark.parametrize(("own", "given"), [(1, 3), (3, 1)])
def test_a_first_stage_and_images_of_other_channels_are_one_line(
    own: int, given: int, metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first_stage_folder(Path("stage"), own)
    write_images("images", B[:5, ..., :given])
    assert toy("stage", "images", "--metrics", metric) == 2
    line = f"the first stage takes {own} channels and sides that are multiples of 4, the images are 32x32x{given}\n"
    assert capsys.readouterr().err == f"error: SAMPLES: {line}"
    assert not Path("logs").exists()


def test_a_grey_first_stage_reconstructs_a_folder_of_grey_images() -> None:
    stage = first_stage_folder(Path("stage"), 1)
    write_images("images", B[:70, ..., :1])
    metrics = ("fd", "reconstruction", "pixel-frechet")
    assert toy("stage", "images", "--metrics", *metrics, "-o", "out.json") == 0
    codec = FirstStageSource(stage).codec()
    again = codec.decode(codec.encode(B[:70, ..., :1]))
    wanted = dkdm.measure(again, B[:70, ..., :1], features="toy", metrics=["fd", "pixel-frechet"]).figures
    assert {name: record()["figures"][name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("metric", ["fd", "reconstruction"])
def test_a_first_stage_whose_latents_are_not_finite_is_one_line(
    metric: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first_stage_folder(Path("stage"), weight=1e9)
    assert toy("stage", "b.npz", "--metrics", metric) == 2
    assert "SAMPLES: the first stage's latents are not finite, or beyond 1e+06" in capsys.readouterr().err


def test_a_model_on_latents_is_measured_by_its_first_stage(teacher_folder: Path, first_stage: Path) -> None:
    asked = ("b.npz", "--metrics", "reconstruction", "-o", "out.json")
    assert evaluate(teacher_folder, *asked) == 0
    figures = record()["figures"]
    assert evaluate(first_stage, *asked) == 0
    assert record()["figures"] == figures


def test_the_run_of_a_first_stage_means_the_first_stage_in_it(first_stage: Path) -> None:
    run = Path("logs/vq")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("trainer: {max_steps: 1}\n")
    shutil.copytree(first_stage, run / "first_stage")
    figures = []
    for path in (first_stage, run, run / "first_stage" / "model.safetensors"):
        assert evaluate(path, "b.npz", "--metrics", "reconstruction", "-o", "out.json") == 0
        figures.append(record()["figures"])
    assert figures[0] == figures[1] == figures[2]


def test_lpips_is_not_measured_with_other_weights(first_stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Path("torch/hub/checkpoints/vgg16-397923af.pth")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"other weights")
    assert evaluate(first_stage, "b.npz", "--metrics", "reconstruction") == 2
    assert "vgg16-397923af.pth is damaged or another file: its SHA-256 is" in capsys.readouterr().err
