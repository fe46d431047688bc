"""Records of noisy states, predictions and training batches."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """States of the reverse chain: x (B,C,H,W) holds x_t at timesteps t (B,) in [0, T-1]."""

    x: Tensor
    t: Tensor
    label: Tensor | None = None  # (B,) class indices

    def to(self, device: torch.device | str) -> "NoisyBatch":
        """The same batch on a device."""
        return NoisyBatch(self.x.to(device), self.t.to(device), None if self.label is None else self.label.to(device))


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for a noisy batch: the noise eps in x_t and the clean state x_0.

    The next state of a chain follows from x_0, which pixel space clips to [-1,1]; eps is never clipped.
    """

    eps: Tensor  # (B,C,H,W)
    x_0: Tensor  # (B,C,H,W)
    var_fraction: Tensor | None = None  # (B,C,H,W), -1 ... 1 from the posterior's log-variance to beta's; learned only


@dataclass(frozen=True)
class DistillBatch:
    """A training batch: noisy states and the target prediction there."""

    x: Tensor
    t: Tensor
    target: Prediction
    label: Tensor | None = None
