"""Measure a student's agreement with its teacher during the training."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.distillation.module import StudentModule
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.agreement import Reference, agreement, new_reference
from ldm_dkdm.evaluation.perceptual import Lpips, find_lpips
from ldm_dkdm.evaluation.reference import read_reference, reference_facts, save_reference
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.reporting import Progress, decoration
from ldm_dkdm.training.ema import averaged, gather_average
from ldm_dkdm.training.ends import AGREEMENT, StepCallback, figures_of

Listener = Callable[[L.Trainer, Mapping[str, float]], None]


class Agreement(StepCallback):
    """Measures the EMA weights on rank 0 every few steps and at the last one, and tells all ranks' listeners.

    The teacher is called once, by `prepare`. A measurement draws no random number, so that the training is the same
    without it. One that fails is logged.

    Args:
        teacher: the teacher of the run.
        file: where the teacher's part is kept for resumes.
        every: steps between measurements; 0 means none, and a run with fewer steps has none either.
        seed: the run's.
    """

    def __init__(self, teacher: DiffusionModel, file: Path, every: int, seed: int) -> None:
        self.teacher, self.file, self.every, self.seed = teacher, file, every, seed
        self.reference: Reference | None = None  # on rank 0
        self.lpips = Lpips()  # on rank 0, where its weights are in the cache of torch.hub
        self.listeners: list[Listener] = []

    def prepare(
        self, facts: Mapping[str, Any], last_step: int, check: Callable[[], None], progress: bool | Progress
    ) -> None:
        """Compute the teacher's part, or read the one that the run has already.

        Args:
            facts: what it follows from, besides its sizes.
            last_step: the run's.
            check: called before every call of the teacher; what it raises ends the preparation.
            progress: as in `distill`.
        """
        if not self._measures(last_step):
            return
        with decoration("lpips"):
            self.lpips = find_lpips()
        facts = {**facts, **reference_facts(), "seed": self.seed, "precision": self.teacher.precision}
        self.reference = read_reference(self.file, facts)
        if self.reference is None:
            self.reference = new_reference(self.teacher, self.seed, progress=progress, check=check)
            save_reference(self.reference, self.file, facts)

    def _measures(self, last_step: int) -> bool:
        return 0 < self.every <= last_step

    def on_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if not self._measures(trainer.max_steps) or (step % self.every and step < trainer.max_steps):
            return
        gather_average(trainer)
        figures: dict[str, float] = {}
        if self.reference is not None:
            with decoration(AGREEMENT):
                figures = agreement(averaged(trainer, StudentModule, called=True).model, self.reference, self.lpips)
        figures = trainer.strategy.broadcast(figures)
        if AGREEMENT in figures:
            figures_of(module)[AGREEMENT] = figures[AGREEMENT]
            for listener in self.listeners:
                listener(trainer, figures)


def refuse_agreement(config: Any) -> None:
    """Refuse keys that need measurements which a run does not make.

    Raises:
        UserError: the key, and what it needs.
    """
    log, stop = config.logging, config.trainer.early_stop
    wanted = {"keep_best": log.keep_best, "early_stop.monitor": stop is not None and stop.measured}
    if isinstance(config, DistillRun):
        if log.measure_every:
            return
        lacks = "needs the agreement, which evaluate_every: 0 switches off"
    else:
        wanted["evaluate_every"] = bool(log.evaluate_every)
        lacks = "needs a teacher to agree with, which only a distillation has; remove the key"
    for key, given in wanted.items():
        if given:
            raise UserError(f"{key}: {lacks}")
