"""What a network costs: parameters and operations."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def gflops(network: nn.Module, shape: tuple[int, int, int], labeled: bool = False) -> float:
    """GFLOPs (multiplications and additions) of a forward pass of one sample (C,H,W), with a label if `labeled`."""
    shapes = {name: value.to("meta") for name, value in network.state_dict().items()}  # nothing is computed
    label = torch.zeros(1, dtype=torch.long, device="meta") if labeled else None
    inputs = torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta"), label
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, shapes, inputs)
    return counter.get_total_flops() / 1e9


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())
