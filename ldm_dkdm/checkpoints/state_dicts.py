"""Find a network's state dict and its EMA in a file: under any usual name, behind what wrappers leave in names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ldm_dkdm.checkpoints.ema_names import is_averaged, said_of
from ldm_dkdm.checkpoints.reading import as_tensor, holds_tensors, tensors_in
from ldm_dkdm.checkpoints.shapes import under
from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import logger

Value = TypeVar("Value")
UNET = ("time_embed.0.weight", "input_blocks.0.0.weight")  # names that every network of a layout has
DIT = ("x_embedder.proj.weight", "final_layer.linear.weight")
FIRST_STAGE = ("encoder.conv_in.weight", "quant_conv.weight")
RAW = "current_model_state"  # Lightning's key of the weights without averaging; its `state_dict` then is the EMA

# Segments that torch.compile, Lightning's strategies, FSDP and activation checkpointing insert anywhere in a name.
WRAPPER = re.compile(
    r"(?<![^.])(_orig_mod|_forward_module|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\."
)
COUNTERS = ("decay", "initted", "n_averaged", "num_updates", "optimization_step", "step")  # what EMA helpers count
USUAL = ("state_dict", "model", "net", "network", "unet", "denoiser")  # the first name found is taken
NO_NETWORK = re.compile(
    r"opts?(_.*)?$|optims?(_.*)?$|.*optimi[sz]er|.*sched|hyper_parameters|.*scaler|(max_)?exp_avg|momentum_buffer"
)  # parts of a file that hold other tensors
OPTIMIZER = re.compile(r"opts?(_.*)?$|optims?(_.*)?$|.*optimi[sz]er")  # may hold the EMA too (NeMo)
DEPTH = 4  # how deep a state dict may lie


@dataclass(frozen=True)
class Weights:
    """A network's weights under its own names; `raw` also where the file has one kind that is not called EMA.

    `unread` is the place of an EMA in the file whose form is unknown; `several_emas` refuses a choice among EMAs beside
    the raw weights, naming their places.
    """

    raw: dict[str, Tensor] | None = None
    ema: dict[str, Tensor] | None = None
    unread: str = ""
    several_emas: str = ""


@dataclass(frozen=True)
class _Found:
    """A network in a file: where it is, such as `ema.module.`, and its tensors."""

    label: str
    tensors: dict[str, Tensor]
    averaged: bool | None  # None: its label says neither

    @property
    def rank(self) -> list[int]:
        """How usual the words of the label are; the whole file comes first."""
        words = [word for word in self.label.split(".") if word]
        return [USUAL.index(word) if word in USUAL else len(USUAL) for word in words]


def unwrapped(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The tensors without the segments of WRAPPER, and without DistributedDataParallel's leading `module.`."""
    cleaned = {re.sub(r"^(module\.)+", "", WRAPPER.sub("", name)): value for name, value in tensors.items()}
    return cleaned if len(cleaned) == len(tensors) else dict(tensors)


def prefixes_of(names: Mapping[str, Any], signature: tuple[str, str]) -> list[str]:
    """The prefixes, `` or ending in a dot, under which a network with these two names lies; the shortest first."""
    first, second = signature
    found = {name.removesuffix(first) for name in names if name.endswith(first)}
    return sorted((p for p in found if p[-1:] in ("", ".") and p + second in names), key=lambda p: (len(p), p))


def find_weights(content: Any, signature: tuple[str, str], path: Path) -> Weights:
    """The network with these names in a file's content, and its EMA; neither where there is none.

    Beside a part that is called raw (`no_ema`), one that says nothing is the EMA.

    Raises:
        UserError: several networks, none of which has a usual name; of EMAs beside raw weights, the result says it.
    """
    found = [network for label, part in parts_of(content) for network in _networks(label, part, signature, path)]
    averaging = isinstance(content, Mapping) and holds_tensors(content.get(RAW))
    if averaging:
        found = [_Found(one.label, one.tensors, not one.label.startswith(RAW)) for one in found]
    kinds = {kind: [one for one in found if one.averaged is kind] for kind in (True, False, None)}
    beside = bool(kinds[False]) and not kinds[True]
    raw = _only(kinds[False] or kinds[None], path)
    try:
        ema = _only(kinds[None] if beside else kinds[True], path)
    except UserError as error:
        if raw is None:
            raise
        return Weights(raw.tensors, several_emas=str(error))
    if beside and raw is not None and ema is not None:
        places = raw.label.rstrip("."), ema.label.rstrip(".") or "the rest"
        logger.warning(f"{path}: '{places[0]}' says that it is not the EMA, so '{places[1]}' is taken for the EMA")
    unread = ""
    if raw is not None and ema is None:
        ema, unread = _of_helper(content, raw, path)
    if raw is None or ema is None:
        return Weights(None if raw is None else raw.tensors, None if ema is None else ema.tensors, unread)
    return Weights(raw.tensors, completed(ema.tensors, raw.tensors, path))


def completed(ema: dict[str, Tensor], raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """An EMA of some of a network's layers with the raw weights of the others, which were not trained."""
    others = [name for name in raw if name not in ema]
    if not others or not _is_part(ema, raw):
        return ema
    logger.warning(
        f"{path}: holds EMA weights of {len(ema)} of {len(raw)} tensors; the others ({', '.join(others[:4])}) are "
        "taken as they are, as of layers that were not trained"
    )
    return {**raw, **ema}


def _is_part(part: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of a network, by their names and shapes."""
    return bool(part) and all(name in whole and value.shape == whole[name].shape for name, value in part.items())


def parts_of(content: Any, label: str = "", named: bool = False) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The dictionaries in a file's content that hold tensors, each with its dotted place.

    `named`: only those in dictionaries, by names; none in a list, under a number or in the state of an optimizer.
    """
    if not isinstance(content, Mapping if named else (Mapping, list, tuple)) or label.count(".") > DEPTH:
        return
    if isinstance(content, Mapping) and holds_tensors(content):
        yield label, content
    for place, value in _named(content, label) if named else _inside(content, label):
        yield from parts_of(value, place, named)


def _named(content: Mapping[Any, Any], label: str) -> Iterator[tuple[str, Any]]:
    """What a dictionary holds by a name of weights, with its dotted place."""
    for key, value in content.items():
        if isinstance(key, str) and not NO_NETWORK.match(key):
            yield f"{label}{key}.", value


def _inside(content: Any, label: str) -> Iterator[tuple[str, Any]]:
    """What a dictionary or list holds, with its dotted place; of an optimizer's state only what is called EMA."""
    for key, value in _items(content):
        if not NO_NETWORK.match(key):
            yield f"{label}{key}.", value
        elif OPTIMIZER.match(key):
            yield from _averages(value, f"{label}{key}.")


def _averages(content: Any, label: str) -> Iterator[tuple[str, Any]]:
    """What is called EMA within the state of optimizers, with its dotted place."""
    for key, value in _items(content) if label.count(".") <= DEPTH else ():
        if is_averaged(key) and not NO_NETWORK.match(key):
            yield f"{label}{key}.", value
        else:
            yield from _averages(value, f"{label}{key}.")


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """Values of a dictionary by their names or numbers (the rate of an EMA), dictionaries in a list by their place."""
    if isinstance(content, Mapping):
        yield from ((str(key), value) for key, value in content.items() if isinstance(key, (str, int, float)))
    elif isinstance(content, (list, tuple)):
        yield from ((str(place), value) for place, value in enumerate(content) if isinstance(value, Mapping))


def _networks(label: str, part: Mapping[Any, Any], signature: tuple[str, str], path: Path) -> Iterator[_Found]:
    plain = {WRAPPER.sub("", name): name for name in part if isinstance(name, str)}
    if not prefixes_of(plain, signature):
        return
    tensors: Mapping[str, Tensor] = tensors_in(part, path)
    if not prefixes_of(tensors, signature):  # wrapped within the network
        tensors = unwrapped(tensors)
    for prefix in prefixes_of(tensors, signature):
        own = unwrapped(under(tensors, prefix))
        counted = {name for name in COUNTERS if name in tensors and tensors[name].numel() == 1}
        own = {name: value for name, value in own.items() if name not in counted}
        yield _Found(label + prefix, own, True if "n_averaged" in counted else said_of(label + prefix))


def _only(found: Sequence[_Found], path: Path) -> _Found | None:
    """The network with the most usual name."""
    best = [one for one in found if one.rank == min(other.rank for other in found)]
    if len(best) > 1 and not _nested(best):
        names = ", ".join(one.label.rstrip(".") for one in best[:4])
        raise UserError(f"{path}: holds several networks ({names}); save the wanted one alone: its state_dict()")
    return best[0] if best else None


def _nested(found: Sequence[_Found]) -> bool:
    """Whether all are the same tensors, as a module that is registered twice leaves them."""
    first = found[0].tensors
    return all(
        other.tensors.keys() == first.keys()
        and all(value.data_ptr() == first[name].data_ptr() for name, value in other.tensors.items())
        for other in found[1:]
    )


def _of_helper(content: Mapping[Any, Any], raw: _Found, path: Path) -> tuple[_Found | None, str]:
    """The EMA that a helper class saved without the parameters' dots, or as a list in their order; else its place.

    LitEma drops the dots; torch_ema and diffusers' EMAModel keep `shadow_params`. One of some layers may lack those by
    which a network is found.
    """
    for label, whole in parts_of(content):
        part = {name: value for name, value in whole.items() if isinstance(name, str)}
        dotless = dotless_ema(part, raw.tensors)
        if dotless:
            return _Found(label, tensors_in(dotless, path), True), ""
        tensors = unwrapped(tensors_in(part, path)) if is_averaged(label) else {}
        own = {name: value for name, value in tensors.items() if name not in COUNTERS or value.numel() > 1}
        if _is_part(own, raw.tensors):
            return _Found(label, own, True), ""
    unread = [(label, part) for label, part in _everything(content) if is_averaged(label) and len(part)]
    trained = [name for name in raw.tensors if name != "pos_embed"]  # DiT's sinusoids, which some helpers leave out
    for (label, part), names in product(unread, (list(raw.tensors), trained)):
        if _fits(part, [raw.tensors[name] for name in names]):
            values = [as_tensor(value, label, path) for value in part]
            return _Found(label, {**raw.tensors, **dict(zip(names, values, strict=True))}, True), ""
    place = unread[0][0].rstrip(".") if unread else ""
    if unread:
        logger.warning(f"{path}: the EMA weights in '{place}' have an unknown form; raw ones are used")
    return None, place


def dotless_ema(part: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any] | None:
    """LitEma's weights `..ema.<name without dots>` under the names of a network; None where any is missing."""
    first = next(iter(names), "").replace(".", "")
    for key in part:
        head, found, rest = key.partition("ema.")
        if found and rest.endswith(first) and "." not in rest:
            prefix = head + found + rest.removesuffix(first)
            keys = {name: prefix + name.replace(".", "") for name in names}
            if all(key in part for key in keys.values()):
                return {name: part[key] for name, key in keys.items()}
    return None


def _everything(content: Any, label: str = "") -> Iterator[tuple[str, Any]]:
    """Dictionaries, lists and tuples in a file's content, with their dotted places."""
    if not isinstance(content, (Mapping, list, tuple)):
        return
    if label and (label.count(".") <= DEPTH or not isinstance(content, Mapping)):
        yield label, content
    if label.count(".") <= DEPTH:
        for place, value in _inside(content, label):
            yield from _everything(value, place)


def _fits(values: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a list or tuple holds tensors of the same shapes."""
    if not isinstance(values, (list, tuple)) or len(values) != len(tensors):
        return False
    return all(isinstance(own, Tensor) and own.shape == theirs.shape for own, theirs in zip(values, tensors))
