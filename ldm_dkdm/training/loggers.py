"""Where a run's figures and grids are logged: Lightning's loggers, and one CSV file through all resumes."""

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from ldm_dkdm.device import is_first_rank
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.agreement import FIGURES
from ldm_dkdm.files import write_text
from ldm_dkdm.training.tables import Table

LOSSES = ("loss", "eps_mse", "vlb")
COLUMNS = ("step", "seconds", "steps_per_second", *LOSSES, "learning_rate", *FIGURES)


class MetricsCsv(Logger):
    """metrics.csv in the run folder.

    Lightning's CSVLogger writes into a folder of its own, which it empties when a run is resumed.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        super().__init__()
        self.table = Table(folder / "metrics.csv", COLUMNS, resumed_at, optional=["vlb", "lpips"])

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder has its config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.table.add({"step": step or 0, **metrics})


class TensorBoard(TensorBoardLogger):
    """Figures and grids in tensorboard/ of the run folder; steps that a resume takes back are hidden."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        purge: dict[str, Any] = {"purge_step": resumed_at + 1} if resumed_at else {}
        super().__init__(folder, name="", version="tensorboard", default_hp_metric=False, **purge)

    def show(self, name: str, image: np.ndarray, step: int) -> None:
        """Log an image uint8 (H,W,C)."""
        self.experiment.add_image(name, image, step, dataformats="HWC")


class WeightsAndBiases(WandbLogger):
    """Figures and grids at Weights & Biases, or with WANDB_MODE=offline in wandb/ of the run folder.

    A resume continues the same run: its id is kept in the run folder.

    Raises:
        UserError: wandb refuses, for example without an account's key.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        import wandb

        known = folder / "wandb" / "id.txt"
        if not known.is_file() and is_first_rank():
            write_text(known, secrets.token_hex(4))
        own = known.read_text() if known.is_file() else None  # other ranks log nothing
        settings = wandb.Settings(console="off", silent=True)
        project = os.environ.get("WANDB_PROJECT", "ldm_dkdm")
        super().__init__(folder.name, folder, id=own, project=project, settings=settings)
        try:
            self.experiment  # noqa: B018 (its first use opens it)
        except wandb.Error as error:
            raise UserError(f"loggers: wandb: {error}; or set WANDB_MODE=offline") from error

    def show(self, name: str, image: np.ndarray, step: int) -> None:
        """Log an image uint8 (H,W,C)."""
        self.log_image(name, [image], step)

    def finalize(self, status: str) -> None:
        """End the run; Lightning leaves it open, and the next one in the process would continue it."""
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


LOGGERS: dict[str, Callable[[Path, int], Logger]] = {
    "csv": MetricsCsv,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # what a logger needs


def require_loggers(names: Sequence[str]) -> None:
    """Refuse a logger whose package is missing.

    Raises:
        UserError: says what to install.
    """
    for name in names:
        package = PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"loggers: {name} is not installed; pip install {package}, or leave {name} out")


def open_loggers(names: Sequence[str], folder: Path, resumed_at: int) -> list[Logger]:
    """The loggers of a run that continues from a step; 0 is its beginning."""
    return [LOGGERS[name](folder, resumed_at) for name in dict.fromkeys(names)]


def show_image(loggers: Sequence[Logger], name: str, image: np.ndarray, step: int) -> None:
    """Log an image uint8 (H,W,C) wherever images can be logged."""
    for logger in loggers:
        if isinstance(logger, TensorBoard | WeightsAndBiases):
            logger.show(name, image, step)
