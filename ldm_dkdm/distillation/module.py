"""The Lightning module that trains a student on any stream of batches."""

import math

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ldm_dkdm.config.schema import LossConfig, TrainerConfig
from ldm_dkdm.diffusion.objectives import simple_loss, space_loss, vlb_loss
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import DistillBatch
from ldm_dkdm.rng import seed_of


class StudentModule(L.LightningModule):
    """Regresses the targets of the stream: L'_simple + lambda L'_vlb (DKDM, Alg. 1; with data as target, Alg. 2).

    Args:
        model: the student.
        loss: space and weights of the loss.
        trainer_config: learning rate, its schedule, weight decay, seed.

    Attributes:
        figures: the last batch's losses, scalars on the device; whoever reads one waits for the device.
    """

    def __init__(self, model: DiffusionModel, loss: LossConfig, trainer_config: TrainerConfig) -> None:
        super().__init__()
        self.model = model
        self.network = model.network
        self.figures: dict[str, Tensor] = {}
        self.time_used = 0.0  # used share of the time limit, 0 ... 1
        self.loss, self.config = loss, trainer_config

    def on_train_start(self) -> None:
        """Give the optimizer the configuration's numbers: a checkpoint restores those that it was saved with."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        for i, group in enumerate(scheduler.optimizer.param_groups):
            scheduler.base_lrs[i] = group["initial_lr"] = self.config.learning_rate
            group["lr"] = self.config.learning_rate * self._lr_factor(scheduler.last_epoch)
            group["weight_decay"] = self.config.weight_decay

    def on_train_batch_start(self, batch: DistillBatch, batch_idx: int) -> None:
        batch_number = self.global_step * self.config.accumulate + batch_idx % self.config.accumulate
        torch.manual_seed(seed_of(self.config.seed, self.global_rank, batch_number, "network"))

    def training_step(self, batch: DistillBatch, batch_idx: int) -> Tensor:
        prediction = self.model(batch.x, batch.t, batch.label)
        space, cap = self.loss.space, self.loss.weight_cap
        loss = space_loss(self.model.schedule, batch.t, batch.target, prediction, space, cap).mean()
        if prediction.var_fraction is not None and self.loss.vlb_weight:
            vlb = vlb_loss(
                self.model.schedule, batch.x, batch.t, batch.target, prediction, self.loss.clip_student
            ).mean()
            loss = loss + self.loss.vlb_weight * vlb
            self.figures["vlb"] = vlb.detach()
        self.figures["loss"] = loss.detach()
        self.figures["eps_mse"] = simple_loss(batch.target.eps, prediction.eps.detach()).mean()
        return loss

    def transfer_batch_to_device(self, batch: DistillBatch, device: torch.device, dataloader_idx: int) -> DistillBatch:
        return batch  # the stream makes its batches on the device

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.config.grad_clip is not None:  # bf16 needs no loss scaling, so gradients are unscaled
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]  # without a walk
            nn.utils.clip_grad_norm_(weights, self.config.grad_clip)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.config
        optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / (self.config.lr_warmup + 1))
        if self.config.lr_schedule == "constant":
            return ramp
        progress = min(1.0, max(step / self.config.max_steps, self.time_used))
        return ramp * 0.5 * (1 + math.cos(math.pi * progress))
