"""Mixed precision: bf16 autocast where the machine multiplies bf16 faster, float32 elsewhere."""

import torch
from torch import autocast as torch_autocast


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
