"""Arguments of Python calls: taken where it is clear what is meant, else refused by name."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.reporting import logger

if TYPE_CHECKING:
    from ldm_dkdm.model.diffusion_model import DiffusionModel


def require_model(value: object, name: str) -> None:
    """Refuse what is not a diffusion model.

    Raises:
        UserError: names the argument, and how a model is made of the value.
    """
    if hasattr(value, "sample_batches"):  # what the package asks of a model
        return
    advice = ""
    if isinstance(value, nn.Module):
        advice = "; make one with DiffusionModel(network, like=MODEL)"
    elif isinstance(value, (str, PathLike)):
        advice = "; open it with load_model(PATH)"
    raise UserError(f"{name}: expected a DiffusionModel, got {kind_of(value)}{advice}")


def require_path(value: object, name: str) -> None:
    """Refuse what is not a path, or is empty: pathlib takes that for the working folder.

    Raises:
        UserError: names the argument.
    """
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{name}: is empty; give a path ('.' is the working folder)")
    if not isinstance(value, (str, PathLike)):
        raise UserError(f"{name}: expected a path, got {kind_of(value)}")


def path_of(value: Any, name: str) -> Path:
    """A path that a user gives, with `~` replaced.

    Raises:
        UserError: names the argument, which is something else.
    """
    require_path(value, name)
    return expanded(value)


def facts_of(info: object) -> dict[str, Any]:
    """Facts for a model's card.

    Raises:
        UserError: something else than a mapping.
    """
    if not isinstance(info, Mapping | None):
        raise UserError(f"info: expected facts by name, got {kind_of(info)}")
    return dict(info or {})


def network_of(network: object, like: object = None) -> nn.Module:
    """A network without what wraps it: torch.compile, DataParallel, DistributedDataParallel, also in each other.

    What is not a network with weights of known shapes is refused, and TorchScript, and a `like` that is not a model.

    Raises:
        UserError: names the argument.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"network: expected an nn.Module called as (x, t, label), got {kind_of(network)}")
    if isinstance(network, torch.jit.ScriptModule):  # its arguments, and whether it trains, may be fixed
        raise UserError("network: is TorchScript; give the module that was traced or scripted, which a run can compile")
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        raise UserError("network: it has lazy layers, whose weights have no shape; call it once on states first")
    if like is not None:
        require_model(like, "like")
    taken = network
    while (inner := _wrapped_in(taken)) is not None:
        taken = inner
    if taken is not network:
        logger.warning(
            f"network: {type(taken).__name__} is taken without the {type(network).__name__} around it; a run compiles "
            "and distributes its networks itself"
        )
    return taken


def _wrapped_in(network: nn.Module) -> nn.Module | None:
    """The module behind torch.compile's wrapper, which has it as `_orig_mod`, or a parallel one; None of any other."""
    parallel = isinstance(network, (DataParallel, DistributedDataParallel))
    return network._modules.get("module" if parallel else "_orig_mod")


def fitting(
    model: "DiffusionModel", x: Tensor, t: Tensor | int, label: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x as float32, t and label as tensors (B,) of whole numbers.

    Ranges are checked on the CPU only: a device is not waited for. A label of another package's network may be any.

    Raises:
        UserError: names the argument that does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != model.shape[0]:
        raise UserError(f"x: expected states (B,{model.shape[0]},H,W), got {kind_of(x)}")
    if not x.is_floating_point():
        raise UserError(f"x: expected states as float32 numbers, got {kind_of(x)}; images are encoded by model.codec()")
    multiple = model.network.multiple if isinstance(model.network, UNet) else 1
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise UserError(f"x: its sides must be multiples of {multiple} for this network, got {kind_of(x)}")
    x = x.float()
    t = _one_each(t, "t", x, model.schedule.num_timesteps)
    if model.num_classes is None or not isinstance(model.network, (DiT, UNet)):
        if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
            label = torch.tensor(int(label), device=x.device).expand(len(x))
        return x, t, cast("Tensor | None", label)
    if label is None:
        raise UserError("label: missing; the model is class-conditional and needs the label of every state")
    rows = model.num_classes + (getattr(model.network, "null_label", None) is not None)  # the last stands for no class
    return x, t, _one_each(label, "label", x, rows)


def _one_each(value: object, name: str, x: Tensor, end: int) -> Tensor:
    """A tensor (B,) of whole numbers 0 ... end - 1, one for each state x; a float tensor may hold whole numbers."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = torch.tensor(int(value), device=x.device)
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        raise UserError(f"{name}: expected whole numbers (B,) as a tensor, got {kind_of(value)}")
    value = value.expand(len(x)) if value.ndim == 0 else value
    if value.shape != x.shape[:1]:
        raise UserError(f"{name}: expected one number for each of {len(x)} states, got {kind_of(value)}")
    if value.is_floating_point():
        others = value[value != value.round()]  # NaN among them
        if len(others) or value.isinf().any():
            raise UserError(f"{name}: expected whole numbers, got {(others if len(others) else value)[0].item():g}")
    value = value.long()
    if value.device.type == "cpu" and len(value):
        least, most = int(value.min()), int(value.max())
        if least < 0 or most >= end:
            raise UserError(f"{name}: {least if least < 0 else most} is outside 0 ... {end - 1}")
    return value


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return "None" if value is None else f"a value of type {type(value).__name__}"
