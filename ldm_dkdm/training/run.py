"""One run of any kind: distillation, training on images, training of a first stage."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import IterableDataset

from ldm_dkdm.checkpoints.hashes import verifying
from ldm_dkdm.checkpoints.loading import load_strictly, require_keys
from ldm_dkdm.checkpoints.reading import read_named_weights
from ldm_dkdm.checkpoints.shapes import under
from ldm_dkdm.config.load import read_card
from ldm_dkdm.config.schema import DistillRun, ModelCard, TrainerConfig
from ldm_dkdm.device import global_rank, is_first_rank, require_graphs, resolve_precision
from ldm_dkdm.errors import Stopped, UserError
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.ranks import losing
from ldm_dkdm.reporting import Progress, logger
from ldm_dkdm.training.agreement_callback import Agreement, refuse_agreement
from ldm_dkdm.training.bars import ProgressBar, StreamModule, progress_callback
from ldm_dkdm.training.busy import warn_if_busy
from ldm_dkdm.training.ema import StudentEMA
from ldm_dkdm.training.ends import EarlyStop, early_ends, ends_of
from ldm_dkdm.training.export import Export, export_again, is_lost, is_reported, report_on
from ldm_dkdm.training.hosts import wait_for_hosts
from ldm_dkdm.training.interrupt import GracefulStop
from ldm_dkdm.training.loggers import open_loggers, require_loggers
from ldm_dkdm.training.resuming import Choice, continues, read_checkpoint, require_trained_alike, set_aside
from ldm_dkdm.training.run_folder import RunFolder, alone_in, check_run, open_run, require_plain, step_of
from ldm_dkdm.training.saving import RunCheckpoint, WrittenInPlace, tidy
from ldm_dkdm.training.sharding import SHARDED
from ldm_dkdm.training.strategies import environment, require_strategy, require_world, strategy_of, training_device
from ldm_dkdm.training.undisturbed import undisturbed
from ldm_dkdm.training.windows import Windows


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        model: the trained `DiffusionModel`, or the `VQModel` of a first stage, with its EMA weights.
        folder: the run folder.
        step: the optimizer steps that it has taken.
        end: why it ended.
    """

    model: Any
    folder: Path
    step: int
    end: str


class Run:
    """A run folder, locked while it trains, with its config, its device, and how to stop and resume it.

    Args:
        config: one of the run schemas.
        folder: logs/<run>.
        resumed: continue although trainer or logging keys have changed.
        progress: True shows bars, False nothing; a function is called with (what, done, total).
        signals: those that stop the training at the next whole iteration; default: Ctrl-C.
        go_on: how to resume, for the message after a stop.

    Raises:
        UserError: fewer devices than the config asks for, a logger that is not installed, measurements that this kind
            of run does not make, or a folder that Lightning reads as a network address.
    """

    def __init__(
        self,
        config: Any,
        folder: RunFolder,
        resumed: bool = False,
        progress: bool | Progress = True,
        signals: Sequence[int] = (signal.SIGINT,),
        go_on: str | None = None,
    ) -> None:
        require_plain(folder.path)
        require_loggers(config.logging.loggers)
        refuse_agreement(config)
        self.config, self.folder, self.resumed, self.progress = config, folder, resumed, progress
        self.trainer: TrainerConfig = config.trainer
        require_strategy(self.trainer.strategy, self.trainer.ranks, self.trainer.compile)
        require_world(self.trainer)
        self.device = training_device(self.trainer)
        require_graphs(self.trainer.compile, self.device)
        self.precision = resolve_precision(self.trainer.precision, self.device)
        self.go_on = go_on or "call it again with the same arguments to continue"
        self.stop = GracefulStop(signals)

    def end(self, network: nn.Module | None = None) -> str | None:
        """Why the run in the folder has ended; None if it has not. Nothing is written.

        Args:
            network: the one to train, if the config does not define its layers.

        Raises:
            UserError: the folder is another run's, its newest checkpoint is damaged, or another network's.
        """
        check_run(self.config, self.folder, self.resumed)
        latest = self.latest
        if latest is None:
            if is_first_rank():  # the others see what this one writes
                self.folder.require_no_model()
            return None
        with verifying(False):  # `latest` is whole
            step, saved = step_of(latest), read_checkpoint(latest)
        require_trained_alike(saved, self.config, self.folder, latest)
        if network is not None:
            require_keys(network, under(saved["state_dict"], "network."), latest)
        if step >= self.trainer.max_steps:
            return f"already at step {step}; a larger trainer.max_steps continues it ({self._resume})"
        for end in ends_of(self.trainer, saved.get("callbacks", {})):
            if end.reached:
                return f"already ended at step {step} by {end.key}; a larger one continues it ({self._resume})"
        return None

    @property
    def latest(self) -> Path | None:
        """The checkpoint to continue from: the newest whole one; errors as `choice`."""
        return self.choice.latest

    @cached_property
    def choice(self) -> Choice:
        """This process's choice of the checkpoint to continue from.

        Raises:
            UserError: the folder is another run's, or has no whole one.
        """
        check_run(self.config, self.folder, self.resumed)
        with verifying(self.trainer.verify):
            rank, ranks = global_rank(self.trainer.per_node), self.trainer.ranks
            return Choice(self.folder.checkpoints, isinstance(self.config, DistillRun), rank, ranks, self.config)

    @property
    def _chooses(self) -> bool:  # the best of several models
        return self.trainer.early_stop is not None or self.config.logging.keep_best

    @property
    def _resume(self) -> str:
        return f"--resume {self.folder.path}, in Python resume=True"

    @property
    def step(self) -> int:
        """The optimizer steps of the newest checkpoint; 0 without one."""
        latest = self.latest
        return step_of(latest) if latest else 0

    def ended(self, model: DiffusionModel, end: str, export: Export) -> Result:
        """The model of a run that has ended; a process that is alone exports lost weights again, but not best ones."""
        logger.info(f"{self.folder.path}: {end}")
        if is_first_rank():
            with suppress(UserError, OSError), alone_in(self.folder):  # not in use, not read-only
                tidy(self.folder)
                if not is_reported(self.folder.path):  # killed after its last save
                    report_on(self.folder.path)
        try:
            return self._saved(model, self.step, end)
        except UserError as error:
            if self.latest is None or self.trainer.ranks > 1 or self._chooses or not is_lost(self.folder, error):
                raise
            export_again(export, self.folder, self.latest, self.trainer.max_steps, str(error))
        return self._saved(model, self.step, end)

    def result(self, model: DiffusionModel, fitted: Result) -> Result:
        """What `fit` made of a model: its EMA weights, or the best ones that the run has saved."""
        if self._chooses or self.trainer.strategy in SHARDED:
            return self._saved(model, fitted.step, fitted.end)
        model.network.eval()
        self._describe(model)
        return replace(fitted, model=model)

    def _saved(self, model: DiffusionModel, step: int, end: str) -> Result:
        card, folder = self._describe(model), self.folder.model
        load_strictly(model.network.eval(), read_named_weights(folder, card.weights), folder / card.weights)
        return Result(model, self.folder.path, step, end)

    def _describe(self, model: DiffusionModel) -> ModelCard:
        """Give a model the path, the weights file and the facts of the run's model folder; returns its card."""
        card, folder = read_card(self.folder.model / "config.yaml", ModelCard), self.folder.model
        model.path, model.file, model.info = folder, folder / card.weights, dict(card.info)
        return card

    @property
    def first_batch(self) -> int:
        """How many batches the newest checkpoint has seen."""
        return self.step * self.trainer.accumulate

    @contextmanager
    def open(self) -> Iterator["Run"]:
        """Lock the folder, write the config, and let a signal ask for a stop; afterwards restore the process.

        Raises:
            UserError: another process trains in the folder.
        """
        with undisturbed(self.device), alone_in(self.folder), self.stop:
            if is_first_rank():
                tidy(self.folder)
                if self.device.type == "cpu":
                    warn_if_busy(torch.get_num_threads())
            open_run(self.config, self.folder, self.resumed)
            yield self

    def check_stop(self, where: str) -> None:
        """End the run between two calls of the teacher if a signal has asked for it.

        Raises:
            Stopped: a signal has.
        """
        if self.stop.requested:
            raise Stopped(f"stopped and saved {where}; {self.go_on}")

    def fit(
        self,
        module: L.LightningModule,
        stream_for: Callable[[L.Trainer], IterableDataset[Any]],
        callbacks: Sequence[L.Callback],
        measuring: Agreement | None = None,
    ) -> Result:
        """Train to `max_steps`, or to an earlier end that the config asks for, from the newest checkpoint.

        Args:
            module: ends up with the EMA weights.
            stream_for: makes the stream of batches once the device and the rank are known.
            callbacks: among them one `RunCheckpoint`, which must come after whatever changes the state.
            measuring: what measures the agreement, in a distillation.

        Raises:
            Stopped: a signal ended the run before its end; all is saved.
            UserError: a file of the data cannot be read; all is saved but where the first step already needs it.
        """
        latest, ends = self.latest, early_ends(self.trainer)
        if self.trainer.strategy in SHARDED:
            module = deepcopy(module)  # sharding is not undone
        windows = Windows(self.config.logging.log_every)
        _keep_best(ends, callbacks)
        if measuring is not None:
            measuring.listeners = [c.measured for c in (windows, *ends, *callbacks) if hasattr(c, "measured")]
        first = [measuring] if measuring is not None else []
        if latest is not None and is_first_rank():
            set_aside(self.folder.checkpoints, latest)
            logger.info(continues(self.folder.path, self.step))
        trainer = self._lightning([self.choice, self.stop, *first, windows, *ends, *callbacks])
        wait_for_hosts(trainer, timedelta(minutes=self.trainer.timeout))
        try:
            with losing(self.trainer.ranks, self.go_on):
                trainer.fit(module, datamodule=StreamModule(stream_for), ckpt_path=latest, weights_only=True)
        except SIGTERMException:
            pass  # the signal asked for a stop, and that saved the run
        except SystemExit as end:  # Lightning's answer to the second Ctrl-C
            raise KeyboardInterrupt from end
        if trainer.is_global_zero:
            report_on(self.folder.path)
        reached = [end.key for end in ends if end.reached]
        if trainer.global_step < self.trainer.max_steps and (self.stop.requested or not reached):
            saved = f"stopped and saved at step {trainer.global_step}; {self.go_on}"
            self.stop.raise_fault(saved)
            raise Stopped(saved)
        return Result(module, self.folder.path, trainer.global_step, (reached or ["trainer.max_steps"])[0])

    def _lightning(self, callbacks: Sequence[L.Callback]) -> L.Trainer:
        config = self.trainer
        bar = progress_callback(self.progress)
        return L.Trainer(
            accelerator=config.accelerator,
            devices=config.per_node,
            num_nodes=config.nodes,
            strategy=strategy_of(config),
            plugins=[environment(), WrittenInPlace()],
            precision="bf16-mixed" if self.precision == "bf16" else "32-true",
            max_steps=config.max_steps,
            accumulate_grad_batches=config.accumulate,
            logger=open_loggers(self.config.logging.loggers, self.folder.path, self.step),
            log_every_n_steps=0,  # `Windows` logs means
            callbacks=[StudentEMA(config.ema_decay, config.ema_warmup), *([bar] if bar else []), *callbacks],
            enable_progress_bar=isinstance(bar, ProgressBar),
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


def _keep_best(ends: Sequence[L.Callback], callbacks: Sequence[L.Callback]) -> None:
    """Let an early stop export the best model, in place of the run's saves, unless these keep the best."""
    for stop in (end for end in ends if isinstance(end, EarlyStop)):
        for saving in (callback for callback in callbacks if isinstance(callback, RunCheckpoint)):
            if not saving.config.keep_best:
                saving.early_stop, stop.on_best = stop, saving.on_saved
