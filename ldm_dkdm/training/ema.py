"""The exponential moving average of the student."""

from collections.abc import Sequence

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn


class StudentEMA(WeightAveraging):
    """Lightning's weight averaging with decay min(d, (1 + n) / (10 + n)) after n updates.

    Lightning's own `EMAWeightAveraging` keeps d from the first step, so that the untrained weights rule a
    short run's average. The first update copies.

    Args:
        decay: d in [0,1).
    """

    def __init__(self, decay: float) -> None:
        def update(averages: Sequence[Tensor], currents: Sequence[Tensor], count: Tensor | int) -> None:
            n = self._latest_update_step  # as `count`, but on the host
            torch._foreach_lerp_(list(averages), list(currents), 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, multi_avg_fn=torch.no_grad()(update))

    @property
    def module(self) -> nn.Module:
        """The averaged LightningModule."""
        return self._average_model.module


def averaged(callbacks: Sequence[object]) -> nn.Module:
    """The averaged module of a running trainer's callbacks."""
    return next(callback for callback in callbacks if isinstance(callback, StudentEMA)).module
