"""Restore the process after a run: warnings, loggers, random generators, backend flags, environment."""

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

# Lightning's advertisements, and advice that does not fit a stream of batches.
IRRELEVANT = (
    ".*does not have many workers.*",
    ".*IterableDataset.*__len__.*",
    ".*GPU available.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*You have overridden `transfer_batch_to_device`.*",
    ".*number of training batches.*",
    ".*callbacks used to create the checkpoint.*",  # an early stop that was removed
    ".*your dataloader is not resumable.*",  # it is: the stream starts at the resumed step
    ".*CUDA Graph is empty.*",  # torch's first graph, which is meant to be
    ".*Experiment logs directory.*",  # only logs of lost steps of this run are replaced
)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Let a run change what it needs inside the block, and undo it afterwards; hide irrelevant warnings.

    Where torch's default device is another than the CPU, it is the run's meanwhile: Lightning makes tensors there.
    """
    default = nullcontext() if torch.get_default_device().type == "cpu" else device
    lightning = logging.getLogger("lightning.pytorch")
    level, environment = lightning.level, dict(os.environ)
    python, numpy = random.getstate(), np.random.get_state()
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with default, warnings.catch_warnings(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for message in IRRELEVANT:
            warnings.filterwarnings("ignore", message=message)
        lightning.setLevel(logging.ERROR)
        try:
            yield
        finally:
            lightning.setLevel(level)
            random.setstate(python)
            np.random.set_state(numpy)
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags
            os.environ.clear()
            os.environ.update(environment)
