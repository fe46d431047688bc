"""What sampling makes of a predicted x_0 before it steps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """Static or dynamic limits of x_0; neither leaves it as it is.

    Attributes:
        limit: x_0 is clipped to [-limit, limit].
        quantile: in place of it, each sample is clipped to [-s, s] and divided by s, where s is this quantile of its
            absolute values, between 1 and `largest` (dynamic thresholding, Saharia et al. 2022, Sec. 2.3).
    """

    limit: float | None = None
    quantile: float | None = None
    largest: float = 1.0

    def __call__(self, x_0: Tensor) -> Tensor:
        """x_0 (B,C,H,W) as a reverse step uses it."""
        if self.quantile is None:
            return x_0 if self.limit is None else x_0.clamp(-self.limit, self.limit)
        rows = x_0.abs().flatten(1)  # one by one: torch.quantile takes 2^24 values at most
        sizes = torch.stack([torch.quantile(row, self.quantile) for row in rows]).clamp(1, self.largest)
        s = sizes.view(-1, 1, 1, 1)
        return x_0.clamp(-s, s) / s
