"""The exponential moving average of the student."""

from collections.abc import Sequence
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

Module = TypeVar("Module", bound=L.LightningModule)


class StudentEMA(WeightAveraging):
    """Lightning's weight averaging with decay d, or min(d, (1 + n) / (10 + n)) in update n = 1, 2, ... (CompVis).

    The initial weights are the first average. Lightning's own `EMAWeightAveraging` keeps d from the first step, so that
    they dominate a short run's average.

    Args:
        decay: d in [0,1).
        ramp: begin with the smaller decay.
    """

    def __init__(self, decay: float, ramp: bool = True) -> None:
        def update(averages: Sequence[Tensor], currents: Sequence[Tensor], count: Tensor | int) -> None:
            n = self._latest_update_step + 1  # as `count`, but on the host
            kept = min(decay, (1 + n) / (10 + n)) if ramp else decay
            torch._foreach_lerp_(list(averages), list(currents), 1 - kept)

        super().__init__(use_buffers=False, multi_avg_fn=torch.no_grad()(update))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the initial weights: they are the first average."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged += 1  # else the first update copies

    @property
    def module(self) -> nn.Module:
        """The averaged LightningModule."""
        assert self._average_model is not None  # made when the training starts
        return self._average_model.module


def averaged(trainer: L.Trainer, kind: type[Module]) -> Module:
    """The averaged module, of a known class, that a running trainer's `StudentEMA` keeps."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from another class
    module = next(callback for callback in callbacks if isinstance(callback, StudentEMA)).module
    assert isinstance(module, kind)
    return module
