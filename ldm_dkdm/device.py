"""Rank, device and precision of a process: bf16 autocast where the machine multiplies bf16 faster.

Functions import torch themselves, so that a command can query its rank without it.
"""

import os
from typing import TYPE_CHECKING

from ldm_dkdm.errors import UserError, pick

if TYPE_CHECKING:
    import torch

WITHOUT_PINNED = ("cpu", "mps")  # devices that copy nothing beside their work
PRECISIONS = {
    "auto": "bf16 where the device multiplies it faster, else float32",
    "bf16": "bf16 autocast; weights stay float32",
    "32": "float32",
}


def resolve_precision(choice: str, device: "torch.device | str") -> str:
    """`auto` -> `bf16` on a CPU with bf16 instructions or a GPU that supports it, else `32`.

    Raises:
        UserError: an unknown name.
    """
    import torch

    pick(PRECISIONS, choice, "precision")
    if choice != "auto":
        return choice
    kind = torch.device(device).type
    if kind == "cpu":
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "32"


def autocast(precision: str, device: "torch.device | str") -> "torch.autocast":
    """Autocast context for `bf16`; a disabled one for `32`."""
    import torch

    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def compiles(choice: str, device: "torch.device") -> bool:
    """Whether `trainer.compile` compiles: `auto` does so on a GPU that Triton knows; on a CPU it gains little."""
    from torch.utils._triton import has_triton

    return choice == "true" or (choice == "auto" and device.type == "cuda" and has_triton())


def to_device(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """A small tensor of the host on a device; from pinned memory the copy is under way when this returns."""
    import torch

    if torch.device(device).type in WITHOUT_PINNED:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def local_rank() -> int:
    """The rank of this process among a run's processes on the machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def is_first_rank() -> bool:
    """Whether this is the first of a run's processes on the machine."""
    return local_rank() == 0


def default_device(accelerator: str) -> "torch.device":
    """The device that Lightning will choose for this process.

    Raises:
        UserError: PyTorch finds no such device here.
    """
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if accelerator not in ("auto", "cpu"):
        raise UserError(f"accelerator: PyTorch finds no {accelerator} device here; set it to auto or cpu")
    return torch.device("cpu")


def resolve_device(name: str) -> "torch.device":
    """The device of a PyTorch name, or of `auto`.

    Raises:
        UserError: PyTorch cannot use it here.
    """
    import torch

    if name == "auto":
        return default_device("auto")
    try:
        one = torch.ones(1, device=name)
        one.item()  # the meta device holds no numbers
        return one.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
