"""The exponential moving average of the student."""

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
        super().__init__(use_buffers=False)
        self.decay, self.ramp = decay, ramp
        self._averages: list[Tensor] = []
        self._currents: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """List the weights once: walking a network's modules takes as long as averaging a small one."""
        average = self.module.to(module.device)  # Lightning copied the module before it was moved
        self._averages = [weight.detach() for weight in average.parameters()]
        self._currents = [weight.detach() for weight in module.parameters()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Average after an optimizer step; unlike torch's `AveragedModel` it counts on the host."""
        if trainer.global_step > self._latest_update_step:
            n = self._latest_update_step = trainer.global_step
            kept = min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay
            torch._foreach_lerp_(self._averages, self._currents, 1 - kept)

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
