"""Build networks and first stages from `target` and `params`; a config can name only the classes in a table."""

import inspect
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm_dkdm.config.checked import convert, require_limits
from ldm_dkdm.config.other_names import advice
from ldm_dkdm.errors import MALFORMED, UserError, is_out_of_memory, memory_asked
from ldm_dkdm.reporting import size

Targets = Mapping[str, Callable[..., nn.Module]]

# Keys of third-party classes that are not needed here, and the values at which they change nothing.
IGNORED: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "use_fp16": (False, True),  # trainer.precision decides
    "use_spatial_transformer": (False,),
    "legacy": (False, True),
    "num_heads_upsample": (-1,),
    "monitor": (),
    "lossconfig": (),
    "ckpt_path": (),  # the weights come from the checkpoint that the section names
}


class Unfilled(TorchFunctionMode):
    """Skips random initialisation: the meta device holds no values, but torch would import its compiler for it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        random = func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == "torch.nn.init"
        return (args[0] if args else given["tensor"]) if random else func(*args, **given)


def build(node: Any, targets: Targets, where: str = "params") -> nn.Module:
    """Build the network or first stage that a node with `target` and `params` describes.

    Args:
        node: a config section or a mapping.
        targets: the classes that may be named here: `NETWORKS` or `FIRST_STAGES`.
        where: prefix of the keys in messages.

    Raises:
        UserError: an unknown target, an unknown or missing parameter, one of the wrong kind or range, or a network
            that this machine's memory does not hold.
    """
    get = node.get if isinstance(node, Mapping) else lambda key: getattr(node, key, None)
    factory, params = resolve(get("target"), dict(get("params") or {}), where, targets)
    _check_params(factory, params, where)
    try:
        if is_own(factory) and torch.get_default_device().type != "meta":
            _require_room(factory, params)
        return factory(**params)
    except UserError as error:  # it names the parameter
        raise UserError(f"{where}.{error}") from error
    except (*MALFORMED, MemoryError) as error:
        reason = f"out of memory ({memory_asked(error)})" if is_out_of_memory(error) else error
        raise UserError(f"{where}: {factory.__name__} cannot be built from these values: {reason}") from error


def _require_room(factory: Callable[..., nn.Module], params: Mapping[str, Any]) -> None:
    """Build without memory, and refuse what this machine does not hold."""
    with torch.device("meta"), Unfilled():
        values = factory(**params).state_dict().values()
    needed, memory = (sum(v.nbytes for v in values), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed > memory:
        raise ValueError(f"its weights take {size(needed)}, and this machine has {size(memory)} of memory")


def _check_params(factory: Callable[..., nn.Module], params: Mapping[str, Any], where: str) -> None:
    """Refuse unknown, missing and mistyped parameters; of a user's class only plain types are checked."""
    parameters = inspect.signature(factory).parameters.values()
    accepted = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    plain = {name: p.annotation for name, p in accepted.items() if p.annotation in (int, float, bool, str)}
    hints = typing.get_type_hints(factory.__init__) if is_own(factory) else plain
    for key, value in params.items():
        if key not in accepted and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise UserError(f"{where}.{key}: unknown key of {factory.__name__}{advice(key, accepted)}")
        if key in hints:
            require_limits(convert(hints[key], value, f"{where}.{key}"), {}, f"{where}.{key}")
    for name, parameter in accepted.items():
        if parameter.default is inspect.Parameter.empty and name not in params:
            raise UserError(f"{where}.{name}: missing; {factory.__name__} needs it")


def is_own(factory: Callable[..., nn.Module] | None) -> bool:
    """Whether a class is this package's, not the user's."""
    return getattr(factory, "__module__", "").startswith("ldm_dkdm.")


def resolve(
    target: Any, params: dict[str, Any], where: str, targets: Targets
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """The class among `targets` that `target` names and its parameters without the ignored ones."""
    if target not in targets:
        section = where.rpartition(".")[0]
        own = "" if where.startswith("first_stage") else "; a class of your own needs --plugin FILE.py"
        raise UserError(f"{section + '.' if section else ''}target: '{target}' is not one of {', '.join(targets)}{own}")
    if is_own(targets[target]) and not target.startswith("ldm_dkdm."):
        for key in [k for k in params if k in IGNORED]:
            if IGNORED[key] and params[key] not in IGNORED[key]:
                raise UserError(f"{where}.{key}: {params[key]!r} is not supported; remove the key")
            del params[key]
    return targets[target], params
