"""Where a process computes and how: ranks, devices, bf16 autocast where the machine multiplies bf16 faster."""

import os

import torch
from torch import autocast as torch_autocast

from ldm_dkdm.errors import UserError


def resolve_precision(choice: str, device: torch.device | str) -> str:
    """`auto` -> `bf16` on a CPU with bf16 instructions or a GPU that supports it, else `32`."""
    if choice != "auto":
        return choice
    kind = torch.device(device).type
    if kind == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "32"


def autocast(precision: str, device: torch.device | str) -> torch_autocast:
    """Autocast context for `bf16`; a disabled one for `32`."""
    return torch_autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def local_rank() -> int:
    """The number of this process among a run's processes on the machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_first_rank() -> bool:
    """Whether this process speaks for all of a run's processes on the machine."""
    return local_rank() == 0


def default_device(accelerator: str) -> torch.device:
    """The device that Lightning will choose for this process."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if accelerator not in ("auto", "cpu"):
        raise UserError(f"trainer.accelerator: PyTorch finds no {accelerator} device here; set it to auto or cpu")
    return torch.device("cpu")
