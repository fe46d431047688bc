"""ldm_dkdm: data-free knowledge distillation of diffusion models (DKDM, CVPR 2025)."""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_dkdm.config.load import load_config
    from ldm_dkdm.diffusion.schedule import NoiseSchedule
    from ldm_dkdm.distillation.pool import NoisyPool
    from ldm_dkdm.errors import Stopped, UserError
    from ldm_dkdm.evaluation.comparison import evaluate
    from ldm_dkdm.evaluation.measurement import measure
    from ldm_dkdm.model import DiffusionModel, load_model
    from ldm_dkdm.reports.page import write_report
    from ldm_dkdm.training.autoencoder import train_first_stage
    from ldm_dkdm.training.from_images import train
    from ldm_dkdm.training.from_teacher import distill

__version__ = "0.2.0"

# Module of each public name; it is imported on first use, so that `import ldm_dkdm` does not import torch.
_HOMES = {
    "DiffusionModel": "ldm_dkdm.model",
    "NoiseSchedule": "ldm_dkdm.diffusion.schedule",
    "NoisyPool": "ldm_dkdm.distillation.pool",
    "Stopped": "ldm_dkdm.errors",
    "UserError": "ldm_dkdm.errors",
    "distill": "ldm_dkdm.training.from_teacher",
    "evaluate": "ldm_dkdm.evaluation.comparison",
    "load_config": "ldm_dkdm.config.load",
    "load_model": "ldm_dkdm.model",
    "measure": "ldm_dkdm.evaluation.measurement",
    "train": "ldm_dkdm.training.from_images",
    "train_first_stage": "ldm_dkdm.training.autoencoder",
    "write_report": "ldm_dkdm.reports.page",
}

__all__ = [
    "DiffusionModel",
    "NoiseSchedule",
    "NoisyPool",
    "Stopped",
    "UserError",
    "__version__",
    "distill",
    "evaluate",
    "load_config",
    "load_model",
    "measure",
    "train",
    "train_first_stage",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm_dkdm' has no attribute '{name}'")
    with _unchanged():
        return getattr(importlib.import_module(_HOMES[name]), name)


@contextmanager
def _unchanged() -> Iterator[None]:
    """Undo what imports of other packages do to warning filters and the environment."""
    environment = dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
