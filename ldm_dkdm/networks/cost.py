"""What a network costs: parameters and operations."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ldm_dkdm.networks.modes import in_eval_mode


def gflops(network: nn.Module, shape: tuple[int, int, int], labeled: bool = False) -> float:
    """GFLOPs (multiplications and additions) of a forward pass of one sample (C,H,W), with a label if `labeled`."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    try:
        return _counted(network, {name: value.to("meta") for name, value in tensors.items()}, shape, labeled)
    except RuntimeError:  # a user's network with tensors that are not buffers
        return _counted(network, tensors, shape, labeled)


def _counted(network: nn.Module, tensors: dict[str, Tensor], shape: tuple[int, int, int], labeled: bool) -> float:
    """The GFLOPs with these tensors; on the meta device nothing is computed."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    formats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()] or [torch.float32]
    dtype = torch.float32 if torch.float32 in formats else formats[0]
    label = torch.zeros(1, dtype=torch.long, device=device) if labeled else None
    inputs = torch.zeros(1, *shape, dtype=dtype, device=device), torch.zeros(1, dtype=torch.long, device=device), label
    with torch.no_grad(), in_eval_mode(network), FlopCounterMode(display=False) as counter:
        functional_call(network, tensors, inputs)
    return counter.get_total_flops() / 1e9


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())
