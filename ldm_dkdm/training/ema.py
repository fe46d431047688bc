"""The exponential moving average of the student."""

from copy import deepcopy
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from ldm_dkdm.training.sharding import ShardedStrategy, full_state, load_full_state, local

Module = TypeVar("Module", bound=L.LightningModule)
# Buffers of the average and of the training, and a name in both.
BufferPair = tuple[dict[str, Tensor | None], dict[str, Tensor | None], str]


class StudentEMA(WeightAveraging):
    """Lightning's weight averaging with decay d, or min(d, (1 + n) / (10 + n)) in update n = 1, 2, ... (CompVis).

    The initial weights are the first average. Lightning's own `EMAWeightAveraging` keeps d from the first step, so that
    they dominate a short run's average. Buffers, such as the statistics of batch norms, are those of the training, as
    in torch's `AveragedModel(use_buffers=False)`.

    Args:
        decay: d in [0,1).
        ramp: begin with the smaller decay.
    """

    def __init__(self, decay: float, ramp: bool = True) -> None:
        super().__init__(use_buffers=False)
        self.decay, self.ramp = decay, ramp
        self._averages: list[Tensor] = []
        self._currents: list[Tensor] = []
        self._buffers: list[BufferPair] = []
        self.sharded = False
        self.whole: nn.Module | None = None  # on rank 0, where the average is sharded; in host memory unless it is lent
        self._lent = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the initial weights: they are the first average."""
        mesh = pl_module.__dict__.pop("_device_mesh", None)  # Lightning's, which cannot be copied
        super().setup(trainer, pl_module, stage)
        pl_module.__dict__["_device_mesh"] = mesh

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """List the weights once: walking a network's modules takes as long as averaging a small one."""
        if not self.sharded:
            self._average.to(module.device)  # Lightning copied the module before it was moved
        self._averages = [local(weight.detach()) for weight in self._average.parameters()]
        self._currents = [local(weight.detach()) for weight in module.parameters()]
        self._buffers = _buffer_pairs(self._average, module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Average after an optimizer step; unlike torch's `AveragedModel` it counts on the host."""
        if trainer.global_step > self._latest_update_step:
            n = self._latest_update_step = trainer.global_step
            kept = min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay
            torch._foreach_lerp_(self._averages, self._currents, 1 - kept)
            _copy_buffers(self._buffers)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            self.whole = deepcopy(self._average).to("cpu") if trainer.is_global_zero else None
            trainer.strategy.shard(self._average)
            self.sharded = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.sharded:
            checkpoint["state_dict"] = full_state(self._average)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self.sharded:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        assert self._average_model is not None  # made by `setup`
        with torch.no_grad():  # the strategy has read the average into the module
            for average, current in zip(self._average.parameters(), pl_module.parameters(), strict=True):
                local(average).copy_(local(current))
            _copy_buffers(_buffer_pairs(self._average, pl_module))
        self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
        load_full_state(pl_module, checkpoint["current_model_state"])

    def gather(self) -> None:
        """Collect a sharded average on rank 0, where `module` then has it; all processes must call this."""
        if self.sharded:
            state = full_state(self._average)
            if self.whole is not None:
                self.whole.load_state_dict(state)
                with torch.no_grad():
                    _copy_buffers(_buffer_pairs(self.whole, self._average))  # those too that no state_dict has

    def lend(self, device: torch.device) -> None:
        """Bring a sharded average that was gathered to a device, until the next batch."""
        if self.whole is not None:
            self.whole.to(device)
            self._lent = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        """Free the device of what `lend` brought there."""
        if self.whole is not None and self._lent:
            self.whole.to("cpu")
            self._lent = False

    @property
    def _average(self) -> nn.Module:
        assert self._average_model is not None  # made when the training starts
        return self._average_model.module

    @property
    def module(self) -> nn.Module:
        """The averaged LightningModule; of a sharded one, on rank 0, as it was last gathered."""
        return self._average if self.whole is None else self.whole


def _buffer_pairs(average: nn.Module, current: nn.Module) -> list[BufferPair]:
    """The buffers of an averaged module and of the module it averages, except those that are views of parameters.

    They are kept as places, since a module may put another tensor in a buffer's place.
    """
    owned = {local(weight).untyped_storage().data_ptr() for weight in average.parameters()}
    return [
        (theirs._buffers, ours._buffers, name)
        for theirs, ours in zip(average.modules(), current.modules(), strict=True)
        for name, buffer in theirs._buffers.items()
        if buffer is None or buffer.layout != torch.strided or buffer.untyped_storage().data_ptr() not in owned
    ]


def _copy_buffers(pairs: list[BufferPair]) -> None:
    """Copy the buffers of the training into the average, without waiting for a device."""
    both = []
    for average, current, name in pairs:
        own, found = average[name], current.get(name)
        if found is not None and own is not None and _alike(own, found):
            both.append((own, found))
        else:  # filled, emptied or of another shape since
            average[name] = None if found is None else found.detach().clone()
    if both:
        torch._foreach_copy_([own for own, _ in both], [found for _, found in both])


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether one dense tensor can be copied into the other, element by element."""
    dense = one.layout == other.layout == torch.strided
    return dense and (one.shape, one.dtype) == (other.shape, other.dtype) and 0 not in one.stride()


def averaged(trainer: L.Trainer, kind: type[Module], called: bool = False) -> Module:
    """The averaged module, of a known class, that a running trainer's `StudentEMA` keeps.

    A sharded one is on rank 0, once `gather_average` was called: on the trainer's device until the next batch if it is
    to be `called`, else in host memory.
    """
    average = _average_of(trainer)
    if called:
        average.lend(trainer.strategy.root_device)
    module = average.module
    assert isinstance(module, kind)
    return module


def gather_average(trainer: L.Trainer) -> None:
    """Make a sharded average ready for `averaged`; all processes must call this."""
    _average_of(trainer).gather()


def _average_of(trainer: L.Trainer) -> StudentEMA:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it elsewhere
    return next(callback for callback in callbacks if isinstance(callback, StudentEMA))
