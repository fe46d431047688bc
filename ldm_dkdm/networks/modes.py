"""Networks in another mode: for evaluation, compiled, or with the weights of bf16 autocast."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm.errors import UserError

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose weights autocast casts in every call
SHAPES = 64  # that may be compiled: two networks, each with and without gradients, for every size of a batch


def tensor_of(output: Any) -> Tensor:
    """The tensor of a network's output: diffusers' networks hand over a record with `sample`, which may be a tuple.

    Raises:
        UserError: an output without one.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "sample", output[0] if isinstance(output, tuple) and output else None)
    if not isinstance(found, Tensor):
        raise UserError(f"network: its output is of type {type(output).__name__}, expected a tensor (B,C,H,W)")
    return found


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Without dropout and without new batch statistics; afterwards every module has its own mode again."""
    training = [module for module in network.modules() if module.training]
    if training:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen_meanwhile(network: nn.Module) -> Iterator[None]:
    """Let a block freeze a network's weights; afterwards those that could be trained can be again.

    Those that torch.inference_mode() made stay frozen: they cannot be trained.
    """
    trainable = [weight for weight in network.parameters() if weight.requires_grad and not weight.is_inference()]
    try:
        yield
    finally:
        for weight in trainable:
            weight.requires_grad_(True)


def make_trainable(network: nn.Module, what: str, teacher: nn.Module | None = None) -> None:
    """Let the weights of a network be trained where all are frozen, as those of an earlier teacher are.

    A network that is frozen in part stays so, and so do the weights that its class names in `fixed`.

    Raises:
        UserError: no weights, the teacher's, or those that torch.inference_mode() made; `what` is the argument.
    """
    weights = dict(network.named_parameters())
    if not weights:
        raise UserError(f"{what}: its network has no weights to train")
    if any(weight.is_inference() for weight in weights.values()):
        raise UserError(f"{what}: its weights were made within torch.inference_mode(), so none can be trained")
    if any(weight.requires_grad for weight in weights.values()):
        return
    theirs = set() if teacher is None else {id(weight) for weight in teacher.parameters()}
    if any(id(weight) in theirs for weight in weights.values()):
        raise UserError(f"{what}: its weights are the teacher's; make a new network")
    fixed = getattr(network, "fixed", ())
    for name, weight in weights.items():
        weight.requires_grad_(name not in fixed)


@contextmanager
def compiled(networks: Sequence[nn.Module], compiles: bool) -> Iterator[None]:
    """Let calls of networks run compiled; the names of their weights stay. Afterwards they are as before.

    All networks share torch's limit on the shapes that are compiled, 8, after which calls run uncompiled. Teacher
    check, warm-up, measurements and grids have batches of their own sizes, so it is raised meanwhile.
    """
    chosen = [network for network in networks if compiles]
    try:
        with torch._dynamo.config.patch(recompile_limit=SHAPES) if chosen else nullcontext():
            for network in chosen:
                network.compile(dynamic=False)
            yield
    finally:
        for network in chosen:
            network._compiled_call_impl = None


@contextmanager
def replayed(network: nn.Module, rows: int, graphs: bool = True, trains: bool = False) -> Iterator[None]:
    """Let a compiled network's calls on `rows` states replay CUDA graphs; afterwards as before.

    A replay needs the shapes that were recorded, so calls on other numbers of states stay as they are. It writes to the
    same memory as the one before, so its output (rows,C,H,W) is handed over as a copy.

    Args:
        trains: the calls with gradients, and their backward passes, in place of those without. The gradients are in
            that memory too, where the next call overwrites them: by then an optimizer must have used them.
    """
    before = network._compiled_call_impl
    if graphs:
        network._compiled_call_impl = _replaying(network, before or network._call_impl, rows, trains)
    try:
        yield
    finally:
        network._compiled_call_impl = before


def _replaying(network: nn.Module, otherwise: Callable[..., Tensor], rows: int, trains: bool) -> Callable[..., Tensor]:
    recorded = torch.compile(network._call_impl, dynamic=False, mode="reduce-overhead")

    def call(x: Tensor, *rest: Tensor | None) -> Tensor:
        if len(x) != rows or torch.is_grad_enabled() is not trains:
            return otherwise(x, *rest)
        return tensor_of(recorded(x, *rest)).clone()

    return call


def stored_in_bf16(network: nn.Module) -> nn.Module:
    """A frozen copy that stores the weights which bf16 autocast casts as bf16: under autocast it computes the same.

    It shares the other weights. A network without such weights is returned itself.
    """
    uses = Counter(id(weight) for module in network.modules() for weight in module.parameters(recurse=False))
    memo: dict[int, Tensor] = {id(weight): weight for weight in network.parameters()}
    cast = 0
    for module in network.modules():
        if type(module) not in CAST_BY_AUTOCAST or "parametrizations" in module._modules:
            continue  # a subclass may use its weights otherwise
        for weight in module.parameters(recurse=False):
            if uses[id(weight)] == 1 and weight.dtype == torch.float32:
                memo[id(weight)] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
                cast += 1
    return copy.deepcopy(network, memo) if cast else network
