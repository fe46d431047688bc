"""Tell networks that are as their target and params make them from those with replaced layers or changed constants."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ldm_dkdm.checkpoints.state_dicts import WRAPPER, unwrapped
from ldm_dkdm.config.registry import Unfilled, build, is_own
from ldm_dkdm.config.schema import NetworkConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.reporting import logger

FREE = ("training", "use_checkpoint", "inplace", "p")  # attributes that change no output of a trained network
UNSEEN = ("image_size", "dropout")  # attributes that change nothing computed from loaded weights
PLAIN = (bool, int, float, str, tuple)  # types of the constants of layers


def require_as_built(network: nn.Module, node: NetworkConfig) -> None:
    """Refuse a network of this package that is not as its target and params make it; warn of forward hooks.

    Hooks may only watch, as those of profilers do, so that they are no reason to refuse.

    Raises:
        UserError: names what differs.
    """
    factory = NETWORKS.get(node.target)
    if factory is None or not is_own(factory):
        return  # a user's class, which is opened by its code
    kind = factory.__name__
    found = next(_differences(network, node, kind), None)
    if found is not None:
        raise UserError(
            f"network: {found}, and a file of a {kind} does not say so; make the change in a class of your own, "
            f"class Mine({kind}), which the formats folder and safetensors name and network=Mine(...) opens"
        )
    hooked = _hooked(network)
    if hooked:
        where = f"its {hooked[0]}" if hooked[0] else "it"
        logger.warning(f"network: {where} has a forward hook, which no file holds")


def is_as_built(network: nn.Module, node: NetworkConfig) -> bool:
    """Whether target, params and weights say all that a network computes: a class of this package, nothing changed."""
    factory = NETWORKS.get(node.target)
    if factory is None or not is_own(factory) or _hooked(network):
        return False
    try:
        return next(_differences(network, node, factory.__name__), None) is None
    except UserError:  # a node of the user's that does not build
        return False


def _hooked(network: nn.Module) -> list[str]:
    """Names of the modules with forward hooks."""
    return [name for name, own in network.named_modules() if own._forward_hooks or own._forward_pre_hooks]


def _differences(network: nn.Module, node: NetworkConfig, kind: str) -> Iterator[str]:
    if type(network) is not NETWORKS[node.target]:
        yield f"it is a {type(network).__name__} instead of a {kind}"
    with torch.device("meta"), Unfilled():
        plain = build(node, NETWORKS)
    built = dict(plain.named_modules(remove_duplicate=False))
    own_modules = {  # behind wrappers, which come before what they hold
        WRAPPER.sub("", f"{name}.").rstrip("."): own for name, own in network.named_modules(remove_duplicate=False)
    }
    for name, own in own_modules.items():
        layer = f"its {name}" if name else "it"
        usual = built.pop(name, None)
        if usual is None:
            if any(True for _ in own.parameters()):
                yield f"{layer} is a layer that a {kind} lacks"
            continue  # a loss, or another part without weights that the network's own forward does not call
        if type(own) is not type(usual):
            yield f"{layer} is a {type(own).__name__} instead of a {type(usual).__name__}"
        if _is_replaced(vars(own).get("forward"), type(own)):
            yield f"{layer} has another forward"
        for key, here, there in _constants(own, usual):
            yield f"{layer} has {key} {here} instead of {there}"
    for name in built:
        yield f"it lacks {name}"
    usual_names, names = plain.state_dict().keys(), unwrapped(network.state_dict()).keys()
    for name in sorted(usual_names ^ names):  # weights behind a norm of their own
        yield f"it {'lacks' if name in usual_names else 'also has'} the tensor {name}"


def _constants(own: nn.Module, usual: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(name, value in `own`, value in `usual`) of a layer's constants that differ."""
    for key, value in vars(usual).items():
        if isinstance(value, PLAIN) and key not in FREE and not key.startswith("_") and vars(own).get(key) != value:
            yield key, vars(own).get(key), value


def other_constant(network: nn.Module, node: NetworkConfig) -> str:
    """Where a network computes with another constant than the one that `node` describes, which no shape shows.

    Such are the groups of a norm and the heads of an attention; empty where there is none.

    Raises:
        UserError: `node` does not build.
    """
    factory = NETWORKS.get(node.target)
    if factory is None or not is_own(factory) or type(network) is not factory:
        return ""
    with torch.device("meta"), Unfilled():
        described = dict(build(node, NETWORKS).named_modules())
    for name, own in network.named_modules():
        for key, here, there in _constants(own, described.get(name, own)):
            if key not in UNSEEN:
                return f"{name + ': ' if name else ''}{key} {there} there, {here} here"
    return ""


def _is_replaced(forward: Any, kind: type[nn.Module]) -> bool:
    """Whether a module's own `forward` is another function than its class has, behind wrappers of libraries."""
    while forward is not None:
        inner = getattr(forward, "_torchdynamo_orig_callable", None) or getattr(forward, "__wrapped__", None)
        inner = inner or getattr(forward, "__func__", None)
        if inner is None:
            return forward is not kind.forward
        forward = inner
    return False
