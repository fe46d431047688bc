"""The pixel distance of large sets: components of a bounded number of images, sums of the rest."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, measure
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation import frechet
from ldm_dkdm.evaluation.components import DrawnImages, pixel_components
from ldm_dkdm.evaluation.frechet import pixel_frechet_distance
from ldm_dkdm.evaluation.gathering import gather
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import NpzImages, TensorImages, image_files
from ldm_dkdm.images import save_image, to_image
from ldm_dkdm.networks import UNet
from tests.parts import UNET_PARAMS, randomised
from tests.test_frechet import images_of

A, B = images_of(200, 8, 0), images_of(90, 8, 1)


def distance(samples: object, reference: object, cache: Path, **options: object) -> float:
    return measure(samples, reference, metrics=["pixel-frechet"], cache=cache, **options).figures["pixel Frechet"]


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Components of 70 images at most."""
    monkeypatch.setattr(frechet, "IMAGES", 70)


@pytest.mark.usefixtures("_few")
def test_files_and_tensors_give_the_same_components(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", A.numpy())
    for number, image in enumerate(A):
        save_image(to_image(image), tmp_path / "a" / f"{number:03d}.png")
    wanted = pixel_frechet_distance(A, B)
    for number, reference in enumerate((A, tmp_path / "a.npz", tmp_path / "a")):
        found = distance(B, reference, tmp_path / f"cache{number}", batch_size=7 + 20 * number)
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.usefixtures("_few")
def test_a_models_first_samples_are_drawn_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomised(UNet(**UNET_PARAMS))
    model = DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=20), space="pixel")
    drawn: list[int] = []
    network.register_forward_pre_hook(lambda _, inputs: drawn.append(len(inputs[0])))
    source = sampled(model, SamplingConfig(100, 32, seed=5, steps=1))
    extractor, again = pixel_components(source, tmp_path, 32)
    assert isinstance(again, DrawnImages) and again.identity() == source.identity()
    for first, size in ((0, 32), (0, 7), (50, 32), (69, 1), (70, 9), (93, 4)):
        wanted = torch.cat(list(source.batches(first, size)))
        assert torch.equal(torch.cat(list(again.batches(first, size))), wanted)
    drawn.clear()
    (found,) = gather(again, {"c": extractor}, set(), batch_size=32).values()
    assert sum(drawn) == 100 - 70
    images = torch.cat(list(source.batches(0, 32)))
    np.testing.assert_allclose(found.mu, extractor.basis.project(images).mean(0), atol=1e-12)
    reopened, plain = pixel_components(source, tmp_path, 32)
    assert plain is source and reopened.sha256 == extractor.sha256


def test_a_damaged_cache_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = distance(B, A, tmp_path)
    for damage in (lambda content: content[:-300], lambda content: b""):
        (file,) = tmp_path.glob("*.components.npz")
        file.write_bytes(damage(file.read_bytes()))
        with caplog.at_level(logging.WARNING, "ldm_dkdm"):
            assert distance(B, A, tmp_path) == wanted
        assert "the components are computed again" in caplog.text
        caplog.clear()


def test_what_has_no_components_is_refused_before_any_work(tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    for reference, reason in (
        (A[:64], "pixel-frechet needs 65 images or more in both sets"),
        (A[:1].repeat(70, 1, 1, 1), "its images are all the same"),
        (tmp_path / "statistics.npz", "holds no images, whose pixels pixel-frechet needs"),
        (images_of(70, 6, 0), "the images of tensor are 8x8 RGB, those of tensor 6x6 RGB$"),
    ):
        with pytest.raises(UserError, match=reason):
            distance(B, reference, tmp_path / "cache")
    with pytest.raises(UserError, match="needs 65 images"):
        distance(B[:64], A, tmp_path / "cache")


def test_pixels_are_not_kept(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", A.numpy())
    source = NpzImages(tmp_path / "a.npz", "a")
    extractor, reference = pixel_components(source, None, 16)
    found = gather(reference, {"c": extractor}, set(), batch_size=16)["c"]
    assert found.features is None and found.mu.shape == (64,) and found.sigma.shape == (64, 64)
    assert image_files(tmp_path / "a.npz").count == TensorImages(A).count == found.count
