"""Frechet distance between two Gaussians, and between two sets of images on principal components of pixels."""

import numpy as np
from torch import Tensor


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6), in float64.

    The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2). Unlike the square root of C_a C_b it is
    exact for covariances without full rank, such as those of fewer images than features.
    """
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    overlap = np.linalg.svd(_root(cov_a) @ _root(cov_b), compute_uv=False).sum()
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The square root (D,D) of a covariance; eigenvalues that are rounding errors are 0."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def pixel_frechet_distance(reference: Tensor, images: Tensor, components: int = 64) -> float:
    """Frechet distance of two sets of images uint8 (N,H,W,C) in [0,1] pixels.

    Both are projected on the reference's first `components` principal components.
    """
    a, b = (x.flatten(1).double().numpy() / 255 for x in (reference, images))
    centre = a.mean(0)
    _, _, basis = np.linalg.svd(a - centre, full_matrices=False)
    a, b = ((x - centre) @ basis[:components].T for x in (a, b))
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
