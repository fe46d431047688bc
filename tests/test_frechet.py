"""The Frechet distance on pixels against closed forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ldm_dkdm import UserError
from ldm_dkdm.evaluation import frechet
from ldm_dkdm.evaluation.frechet import frechet_distance, pixel_frechet_distance


def gaussian_images(mean: float, std: float, seed: int, count: int = 20_000) -> torch.Tensor:
    """Images uint8 (N,2,2,3) whose pixels are independent Gaussians."""
    values = np.random.default_rng(seed).normal(mean, std, (count, 2, 2, 3))
    return torch.from_numpy(values.round().clip(0, 255).astype(np.uint8))


def test_commuting_covariances_have_a_closed_form() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    a, b = np.arange(1.0, 6.0), np.array([4.0, 1.0, 0.5, 9.0, 2.0])
    cov_a, cov_b = (turn @ np.diag(x) @ turn.T for x in (a, b))
    wanted = 5 * 0.2**2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(5), cov_a, np.full(5, 0.2), cov_b) == pytest.approx(wanted, rel=1e-10)


def test_gaussian_images_are_as_far_apart_as_their_moments() -> None:
    wanted = 12 * ((10 / 255) ** 2 + (15 / 255) ** 2)
    found = pixel_frechet_distance(gaussian_images(120, 15, 0), gaussian_images(130, 30, 1), components=12)
    assert found == pytest.approx(wanted, rel=0.03)


def test_a_set_is_at_no_distance_from_itself() -> None:
    images = gaussian_images(128, 30, 0, count=500)
    assert pixel_frechet_distance(images, images, components=8) == pytest.approx(0, abs=1e-6)


def images_of(count: int, side: int, seed: int, channels: int = 3) -> torch.Tensor:
    """Smooth images uint8 (N,side,side,C): sums of 90 fixed patterns with random weights, and noise."""
    patterns = np.random.default_rng(9).normal(size=(90, side * side * channels)).cumsum(1) / side
    generator = np.random.default_rng(seed)
    x = generator.normal(1 + seed, 1 / np.arange(1, 91), (count, 90)) @ patterns + generator.normal(0, 0.05, (count, 1))
    return torch.from_numpy((128 + 40 * x).clip(0, 255).astype(np.uint8)).view(count, side, side, channels)


def by_singular_vectors(reference: torch.Tensor, images: torch.Tensor, components: int) -> float:
    """The distance on right singular vectors of the whole reference, all in memory, with SciPy's square root."""
    a, b = (x.flatten(1).double().numpy() / 255 for x in (reference, images))
    centre = a.mean(0)
    basis = np.linalg.svd(a - centre, full_matrices=False)[2][:components].T
    (m, c), (n, d) = ((x.mean(0), np.cov(x, rowvar=False)) for x in ((a - centre) @ basis, (b - centre) @ basis))
    return float(((m - n) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real))


@pytest.mark.parametrize(("count", "side", "channels"), [(65, 12, 3), (150, 10, 3), (400, 8, 1), (70, 40, 3)])
def test_the_pixel_distance_is_that_on_singular_vectors(count: int, side: int, channels: int) -> None:
    a, b = images_of(count, side, 0, channels), images_of(90, side, 1, channels)
    components = min(64, side * side * channels)
    assert pixel_frechet_distance(a, b) == pytest.approx(by_singular_vectors(a, b, components), rel=1e-6)


def test_components_of_a_large_set_are_those_of_images_at_even_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "IMAGES", 80)
    a, b = images_of(240, 12, 0), images_of(90, 12, 1)
    assert pixel_frechet_distance(a, b) == pytest.approx(by_components_of(a[::3], a, b), rel=1e-6)
    assert pixel_frechet_distance(a, b) != pytest.approx(by_components_of(a, a, b), rel=1e-6)


def by_components_of(chosen: torch.Tensor, reference: torch.Tensor, images: torch.Tensor) -> float:
    basis = np.linalg.svd(np.cov(chosen.flatten(1).double().numpy().T))[0][:, :64]
    a, b = (x.flatten(1).double().numpy() / 255 @ basis for x in (reference, images))
    return frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def test_images_that_differ_along_few_directions_give_a_finite_distance() -> None:
    a = images_of(70, 8, 0)
    a[1:] = a[0] // torch.arange(1, 70, dtype=torch.uint8)[:, None, None, None]  # nearly one direction
    assert np.isfinite(pixel_frechet_distance(a, images_of(80, 8, 1)))
    with pytest.raises(UserError, match="its images are all the same"):
        pixel_frechet_distance(a[:1].repeat(70, 1, 1, 1), a)
