"""Frechet distance between two sets of images on principal components of pixels: no network, no data."""

import numpy as np
from scipy.linalg import sqrtm
from torch import Tensor


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6)."""
    root = sqrtm(cov_a @ cov_b)
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root.real))


def pixel_frechet_distance(reference: Tensor, images: Tensor, components: int = 64) -> float:
    """Frechet distance of two sets of images uint8 (N,H,W,C) in [0,1] pixels.

    Both are projected on the reference's first `components` principal components.
    """
    a, b = (x.flatten(1).double().numpy() / 255 for x in (reference, images))
    centre = a.mean(0)
    _, _, basis = np.linalg.svd(a - centre, full_matrices=False)
    a, b = ((x - centre) @ basis[:components].T for x in (a, b))
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
