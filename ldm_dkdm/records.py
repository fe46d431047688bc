"""What travels between the parts of the package."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """States of the reverse chain: x (B,C,H,W) holds x_t at timesteps t (B,) in [0, T-1]."""

    x: Tensor
    t: Tensor
    label: Tensor | None = None  # (B,) class indices


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says about a noisy batch: the noise eps (B,C,H,W) in x_t."""

    eps: Tensor
    var_fraction: Tensor | None = None  # (B,C,H,W) in [-1,1]; learned-range variance only


@dataclass(frozen=True)
class DistillBatch:
    """A ready training example: noisy states and the teacher's prediction there."""

    x: Tensor
    t: Tensor
    target: Prediction
    label: Tensor | None = None
