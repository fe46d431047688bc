"""The section that says where a run writes, how often, and what it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm_dkdm.config.checked import Section, key, many_of
from ldm_dkdm.errors import UserError

BEST_BY = "x0_drift"  # it ranks students as a distance of images does (docs/evidence.md)


@dataclass(frozen=True)
class LoggingConfig(Section):
    """Where a run writes and how often, in training steps."""

    dir: str = key("logs", path=True, help="Folder that holds the runs.")
    name: str | None = key(None, help="Name of the run folder; null joins the names of the config files.")
    save_every: int = key(5000, min=1, help="Steps between checkpoints, of which the last two are kept.")
    keep_every: int | None = key(
        None, min=1, help="Also keep the checkpoints at multiples of this step, without their pools."
    )
    keep_best: bool = key(
        False,
        help="Also keep the best checkpoint by `best_by`, without its pool, and make its weights the student.",
    )
    best_by: Literal["agreement", "x0_drift"] = key(
        BEST_BY, help="Figure of the agreement's measurements that `keep_best` judges by; the smallest is best."
    )
    sample_every: int = key(5000, min=1, help="Steps between grids of samples.")
    sample_count: int = key(16, min=1, max=4096, help="Samples in a grid.")
    sample_steps: int = key(50, min=1, help="DDIM steps of the grids' samples; the default is at most T.")
    evaluate_every: int | None = key(
        None,
        min=0,
        help="Steps between measurements of a student's agreement with its teacher; null: as `sample_every`, 0: never.",
    )
    log_every: int = key(20, min=1, help="Steps over which losses are averaged for the loggers.")
    loggers: Sequence[str] = many_of(
        "ldm_dkdm.training.loggers:LOGGERS",
        ("csv", "tensorboard"),
        help="Where figures are logged: `csv` is metrics.csv, `tensorboard` and `wandb` also get the grids.",
    )
    export_dtype: Literal["float32", "float16"] = key("float32", help="Number format of the saved model's weights.")

    def __post_init__(self) -> None:
        """Refuse a figure that nothing is judged by."""
        super().__post_init__()
        if not self.keep_best and self.best_by != BEST_BY:
            raise UserError("best_by: has no effect without keep_best: true; leave it out")

    @property
    def measure_every(self) -> int:
        """Steps between measurements of the agreement; 0: never."""
        return self.sample_every if self.evaluate_every is None else self.evaluate_every
