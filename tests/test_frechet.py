"""The Frechet distance on pixels against closed forms."""

import numpy as np
import pytest
import torch

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
