"""One Lightning run: the same for distillation and for training on data."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, IterableDataset

from ldm_dkdm.config.schema import LoggingConfig, TrainerConfig
from ldm_dkdm.device import default_device
from ldm_dkdm.errors import Stopped, UserError
from ldm_dkdm.training.ema import StudentEMA
from ldm_dkdm.training.ends import early_ends
from ldm_dkdm.training.folder import RunFolder, step_of
from ldm_dkdm.training.interrupt import GracefulStop
from ldm_dkdm.training.saving import read_callbacks


def fit(
    module: L.LightningModule,
    stream_for: Callable[[L.Trainer], IterableDataset],
    config: TrainerConfig,
    log: LoggingConfig,
    folder: RunFolder,
    callbacks: list[L.Callback],
    stop: GracefulStop,
    precision: str,
    go_on: str,
) -> L.Trainer:
    """Train to `config.max_steps`, or to an earlier end that the config asks for, from the newest checkpoint.

    Args:
        module: ends up with the EMA weights.
        stream_for: makes the stream of batches once the device and the rank are known.
        callbacks: among them one `RunCheckpoint`, which must come after whatever changes the state.
        precision: `bf16` or `32`.
        go_on: how to resume, for the user.

    Raises:
        Stopped: a signal ended the run before its end; all is saved.
    """
    quiet_lightning()
    latest, ends = folder.latest(), early_ends(config)
    trainer = L.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=config.max_steps,
        accumulate_grad_batches=config.accumulate,
        logger=CSVLogger(folder.path, name="", version=_metrics_name(latest)),
        log_every_n_steps=min(10, config.max_steps),
        callbacks=[
            StudentEMA(config.ema_decay),
            _ProgressBar(refresh_rate=10),
            stop,
            *ends,
            *callbacks,
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = _StreamModule(stream_for)
    with contextlib.suppress(SIGTERMException):  # the signal asked for a stop, and that saved the run
        trainer.fit(module, datamodule=data, ckpt_path=latest, weights_only=True)
    if trainer.global_step < config.max_steps and (stop.requested or not any(end.reached for end in ends)):
        raise Stopped(f"stopped and saved at step {trainer.global_step}; {go_on}")
    return trainer


def finished(folder: RunFolder, config: TrainerConfig) -> str | None:
    """Where and why the run in a folder has come to its end; None if there is more to do."""
    latest = folder.latest()
    if latest is None:
        return None
    step = step_of(latest)
    if step >= config.max_steps:
        return f"already at step {step}; --resume {folder.path} with a larger trainer.max_steps goes on"
    states = read_callbacks(latest)  # also says whether the file is whole
    for end in early_ends(config):
        if end.state_key in states:
            end.load_state_dict(states[end.state_key])
        if end.reached:
            return f"already ended at step {step} by {end.key}; --resume {folder.path} with a larger one goes on"
    return None


def first_batch(folder: RunFolder, config: TrainerConfig) -> int:
    """How many batches the newest checkpoint of a run has seen."""
    latest = folder.latest()
    return step_of(latest) * config.accumulate if latest else 0


def _metrics_name(resumed: Path | None) -> str:
    """A resumed run gets a folder of its own: Lightning's logger empties the one that it is given."""
    return f"metrics-from-{step_of(resumed)}" if resumed else "metrics"


class _ProgressBar(TQDMProgressBar):
    """Steps, speed, ETA and losses; a stream has no epochs, and the logger's version says nothing here."""

    def on_train_start(self, trainer: L.Trainer, *args: object) -> None:
        super().on_train_start(trainer, *args)
        bar, done = self.train_progress_bar, trainer.global_step * trainer.accumulate_grad_batches
        bar.reset(total=trainer.max_steps * trainer.accumulate_grad_batches)
        bar.initial = bar.n = done  # a resumed epoch has no start of its own
        bar.set_description("training")

    def on_train_epoch_start(self, trainer: L.Trainer, *args: object) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.total = trainer.max_steps * trainer.accumulate_grad_batches
        self.train_progress_bar.set_description("training")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: object) -> None:
        super().on_train_batch_end(trainer, module, *args)
        used, done = getattr(module, "time_used", 0.0), trainer.global_step
        if used:  # the ETA is that of the limit where it comes first
            steps = min(trainer.max_steps, max(done, round(done / used)))
            self.train_progress_bar.total = steps * trainer.accumulate_grad_batches

    def on_exception(self, trainer: L.Trainer, *args: object) -> None:
        super().on_exception(trainer, *args)
        print()  # what follows is not glued to the bar

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, int | str | float]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        return metrics


class _StreamModule(L.LightningDataModule):
    """Makes the stream when Lightning knows the device; the stream starts at the resumed step."""

    def __init__(self, stream_for: Callable[[L.Trainer], IterableDataset]) -> None:
        super().__init__()
        self.stream_for = stream_for

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.stream_for(self.trainer), batch_size=None, num_workers=0)


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements and the advice that does not fit a stream."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*IterableDataset.*__len__.*",
        ".*GPU available.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*number of training batches.*",
        ".*callbacks used to create the checkpoint.*",  # an early stop that was taken out
        ".*your dataloader is not resumable.*",  # it is: the stream starts at the resumed step
        ".*Experiment logs directory.*",  # only what a lost stretch of this run logged is replaced
    ):
        warnings.filterwarnings("ignore", message=message)


def training_device(config: TrainerConfig) -> torch.device:
    """The device of this process in a training.

    Raises:
        UserError: no such device here, or fewer than `devices`.
    """
    device = default_device(config.accelerator)
    count = {"cuda": torch.cuda.device_count(), "cpu": os.cpu_count() or 1}.get(device.type, 1)
    if config.devices > count:
        raise UserError(f"trainer.devices: {config.devices}, but this machine has {count} ({device.type})")
    return device
