"""Frechet distance between two Gaussians, and between two sets of images on principal components of pixels."""

import numpy as np
import torch
from scipy.linalg import eigh
from torch import Tensor

from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.moments import Moments

IMAGES = 2000  # most images that principal components are computed from
COMPONENTS = 64
BLOCK = 4096  # values of all these images that are in float64 at once
ROWS = 256  # images that are projected at once


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6), in float64.

    The last trace is the sum of the singular values of A^T B for any factors with C_a = A A^T and C_b = B B^T. Unlike
    the square root of C_a C_b it is exact for covariances without full rank, such as those of fewer images than
    features, and of these the factors are small.
    """
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    overlap = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return 0.0 if distance < 0 else float(distance)  # equal sets leave a rounding error of either sign


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A (D,K) with A A^T = covariance (D,D) of rank K; eigenvalues that are rounding errors are 0."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    found = values > max(0, values[-1] * len(values) * np.finfo(np.float64).eps)
    return vectors[:, found] * np.sqrt(values[found])


def pixel_frechet_distance(reference: Tensor, images: Tensor, components: int = COMPONENTS) -> float:
    """Frechet distance of two sets of images uint8 (N,H,W,C) in [0,1] pixels.

    Both are projected on the first `components` principal components of the reference, or, if it has more than
    IMAGES images, of that many at even distances.
    """
    basis = PixelBasis.of(reference[spread(len(reference))], components)
    a, b = Moments(), Moments()
    for moments, found in ((a, reference), (b, images)):
        for part in found.split(ROWS):
            moments.add(basis.project(part))
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def spread(count: int) -> Tensor:
    """Numbers of at most IMAGES of `count` images, at even distances, from the first on."""
    most = min(count, IMAGES)
    return torch.arange(most, device="cpu") * count // most


class PixelBasis:
    """The mean (D,) and principal components (D,K) of images whose pixels are in [0,1], in float64."""

    def __init__(self, mean: Tensor, components: Tensor) -> None:
        self.mean, self.components = mean, components

    @classmethod
    def of(cls, images: Tensor, most: int = COMPONENTS) -> "PixelBasis":
        """The first `most` components of images uint8 (N,H,W,C), or as many as the images differ along.

        X being the centred images, they are the eigenvectors of X^T X (D,D), or X^T u / |X^T u| for those u of X X^T
        (N,N), whichever is smaller. Both are sums over blocks, so that no copy of the images in float64 is needed.

        Raises:
            UserError: images that are all the same.
        """
        if (images == images[0]).all():
            raise UserError("reference: its images are all the same; they have no principal components")
        x = images.flatten(1)
        count, blocks = len(x), x.split(BLOCK, 1)
        mean = torch.cat([_pixels(block).mean(0) for block in blocks])
        if x.shape[1] <= count:
            moments = Moments()
            for part in x.split(ROWS):
                moments.add(_pixels(part).numpy())
            return cls(mean, _leading(torch.from_numpy(moments.scatter), most)[1])
        products = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        for block in blocks:
            centred = _pixels(block)
            centred -= centred.mean(0)
            products.addmm_(centred, centred.T)
        values, vectors = _leading(products, most)
        weights = vectors / values.sqrt()
        weights -= weights.mean(0)  # takes the place of centring the images again: X^T (u - mean of u)
        return cls(mean, torch.cat([_pixels(block).T @ weights for block in blocks]))

    def project(self, images: Tensor) -> np.ndarray:
        """Images uint8 (B,H,W,C) -> (B,K), float64.

        Raises:
            UserError: images of another size or number of channels.
        """
        own, found = len(self.mean), images[0].numel()
        if found != own:
            raise UserError(f"metrics: images of {found} and {own} values cannot be compared")
        return ((_pixels(images.flatten(1)) - self.mean) @ self.components).numpy()


def _leading(matrix: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (K,) of a covariance (D,D), descending, and their vectors (D,K); none that are 0."""
    side = len(matrix)
    values, vectors = eigh(matrix.numpy(), subset_by_index=[max(0, side - most), side - 1])
    found = np.flatnonzero(values > values[-1] * side * np.finfo(np.float64).eps)[::-1]
    return torch.from_numpy(values[found].copy()), torch.from_numpy(vectors[:, found].copy())


def _pixels(values: Tensor) -> Tensor:
    return values.double() / 255
