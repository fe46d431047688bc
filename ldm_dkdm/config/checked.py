"""Sections that check themselves: dataclasses whose values are converted and checked when they are made."""

import ast
import dataclasses
import functools
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ldm_dkdm.config.other_names import UnknownKey
from ldm_dkdm.config.text_paths import path_of
from ldm_dkdm.errors import UserError, closest

T = TypeVar("T", bound="Section")
LARGEST = 2**63  # every integer accepted is smaller
PACKAGE = Path(__file__).parents[1]
KINDS: dict[Any, str] = {int: "whole number", bool: "true or false", str: "text"}
KINDS |= dict.fromkeys((float, float | int), "number") | dict.fromkeys((dict, Mapping), "section with keys")
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("above", lambda value, limit: value > limit),
    "min": ("at least", lambda value, limit: value >= limit),
    "below": ("below", lambda value, limit: value < limit),
    "max": ("at most", lambda value, limit: value <= limit),
}


class Section:
    """Base of the configuration's dataclasses: it converts and checks every field when an instance is made.

    A field's type hint and its metadata (`key`, `one_of`) say what it may hold. A nested section may be given as a
    mapping.

    Raises:
        UserError: a value of the wrong type or range; the message begins with the field's name.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # subclasses are dataclasses

    def __post_init__(self) -> None:
        """Replace every value by its converted and checked form."""
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):
            value = _field_value(hints[field.name], field.metadata, getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, value)


def key(
    default: Any = MISSING,
    *,
    help: str,
    factory: Callable[[], Any] | None = None,
    path: bool = False,
    why: str = "",
    **limits: float | None,
) -> Any:
    """Declare a key of a section.

    Args:
        default: value of a key that is left out; without it (and without `factory`) the key is required.
        help: meaning of the key in one sentence.
        factory: makes the default, where that is a section or a mapping.
        path: the text is a path, in which `~` is the home folder.
        why: reason of a limit, for the message.
        limits: bounds of a number, or of every entry of a list: `min`, `above`, `below`, `max`; `length` of a list.
    """
    metadata = {"help": help, "path": path, "why": why, **limits}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def one_of(table: str, default: Any = MISSING, *, help: str) -> Any:
    """Declare a text key whose values are the names in a table, written `package.module:TABLE`."""
    return dataclasses.field(default=default, metadata={"help": help, "table": table})


def many_of(table: str, default: Sequence[str], *, help: str) -> Any:
    """Declare a list key whose entries are names in a table."""
    return dataclasses.field(default=default, metadata={"help": help, "table": table})


def names_of(table: str) -> list[str]:
    """Names in a table such as `ldm_dkdm.diffusion.samplers:SAMPLERS`.

    If the module is imported, its current names are used. Otherwise they are read from its source, because importing
    it would import torch.
    """
    module, _, name = table.partition(":")
    loaded = getattr(sys.modules.get(module), name, None)
    if loaded is not None:
        return list(loaded)
    return [str(item.value) for item in _in_source(module, name).keys if isinstance(item, ast.Constant)]


def literal(table: str) -> Any:
    """A table of plain values, `package.module:TABLE`, read from its source without importing it."""
    module, _, name = table.partition(":")
    return ast.literal_eval(_in_source(module, name))


@functools.cache
def _in_source(module: str, name: str) -> ast.Dict:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        value = getattr(node, "value", None)
        if named and isinstance(value, ast.Dict):
            return value
    raise LookupError(f"{path}: {name} is not a literal dict")


def hints_of(schema: Any) -> Mapping[str, Any]:
    """The resolved type hints of a dataclass."""
    return _hints_of(schema)


@functools.cache
def _hints_of(schema: Any) -> Mapping[str, Any]:
    return types.MappingProxyType(typing.get_type_hints(schema))


def parse(schema: type[T], node: Any, where: str = "") -> T:
    """Turn a tree of plain values into the dataclass `schema`.

    Args:
        schema: a subclass of `Section`.
        node: a mapping from field names to values.
        where: dotted key of the section; it prefixes the keys in messages.

    Raises:
        UserError: an unknown or missing key, or a bad value.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{where or 'config'}: expected a section with keys, got {node!r}")
    node = unwrap(node)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for name in node:
        if name not in fields:
            raise UnknownKey(_join(where, name), str(name), fields)
    values = {}
    for name, field in fields.items():
        if name in node:
            values[name] = _field_value(hints_of(schema)[name], field.metadata, node[name], _join(where, name))
        elif is_required(field):
            raise _missing(hints_of(schema)[name], _join(where, name))
    try:
        return schema(**values)
    except UserError as error:
        raise UserError(_join(where, error)) from error


def steps_within(section: Section, name: str, num_timesteps: int) -> int:
    """The sampling steps that a key asks for; a default above T means all T.

    Raises:
        UserError: more steps than T were asked for.
    """
    steps: int = getattr(section, name)
    if steps <= num_timesteps:
        return steps
    if steps == section.__dataclass_fields__[name].default:
        return num_timesteps
    raise UserError(f"{name}: {steps} is more than the {num_timesteps} diffusion steps")


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def _missing(hint: Any, where: str) -> UserError:
    name = where + (".KEY" if dataclasses.is_dataclass(hint) else "")
    return UserError(f"{where}: missing; set it in a --base file or as {name}=...")


def unwrap(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Accept CompVis's `unet_config: {target, params}` and `first_stage_config` in place of target and params."""
    for name in ("unet_config", "first_stage_config"):
        inner = node.get(name)
        if isinstance(inner, Mapping):
            node = {**{k: v for k, v in node.items() if k != name}, **inner}
    return node


def _field_value(hint: Any, metadata: Mapping[str, Any], value: Any, where: str) -> Any:
    """The converted value of a field, within the limits of its metadata."""
    value = convert(hint, value, where)
    if isinstance(value, str) and metadata.get("path"):
        value = path_of(value, where)
    if value is not None and "table" in metadata:
        for name in value if isinstance(value, tuple) else (value,):
            _require_choice(name, names_of(metadata["table"]), where)
    if isinstance(value, tuple):
        if value and len(value) != metadata.get("length", len(value)):
            raise UserError(f"{where}: expected {metadata['length']} entries, got {len(value)}")
        for i, entry in enumerate(value):
            require_limits(entry, metadata, f"{where}[{i}]")
    else:
        require_limits(value, metadata, where)
    return value


def convert(hint: Any, value: Any, where: str) -> Any:
    """Convert a plain value to what a type hint says.

    A list becomes a tuple, an integer becomes a float where one is wanted, a number or a path becomes text where text
    is wanted, a mapping becomes the section that the hint names.

    Raises:
        UserError: the value is of another type; the message begins with `where`.
    """
    options = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        fitting = [o for o in options if o is type(value)] or [o for o in options if o is not type(None)]
        return convert(fitting[0], value, where)
    if origin is typing.Literal:
        return _require_choice(str(value), options, where)
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, where)
    if (origin or hint) is Sequence:
        return _sequence(options[0], value, where)
    return _plain(origin or hint, value, where)


def _section(schema: Any, value: Any, where: str) -> Any:
    """A section as it is, or made from a mapping or from an instance of a base class, such as NetworkConfig."""
    if isinstance(value, schema):
        return value
    if isinstance(value, Section) and issubclass(schema, type(value)):
        return schema(**vars(value))
    return parse(schema, value, where)


def _plain(kind: Any, value: Any, where: str) -> Any:
    """A number, a flag, a text or a mapping."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and isinstance(value, numbers.Integral):
        return int(value)
    if kind is str and (number or isinstance(value, os.PathLike)):
        return str(value)  # YAML reads a run's name such as 2024 as a number
    if kind in (dict, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if kind is int or not isinstance(value, kind):
        raise UserError(f"{where}: expected {article(KINDS[kind])}, got {value!r}")
    return value


def _sequence(item: type, value: Any, where: str) -> tuple[Any, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if isinstance(value, str) or not isinstance(value, Sequence):
        advice = f"; write [{value}]" if isinstance(value, str) and "," in value and value[0] not in "[({" else ""
        raise UserError(f"{where}: expected a list, every entry {article(KINDS[item])}, got {value!r}{advice}")
    return tuple(convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))


def article(kind: str) -> str:
    """Put `a` before the kinds of values that take it."""
    return kind if kind in (KINDS[bool], KINDS[str]) else f"a {kind}"


def _require_choice(value: str, options: Sequence[str], where: str) -> str:
    if value not in options:
        raise UserError(f"{where}: '{value}' is not one of {', '.join(options)}{closest(value, options)}")
    return value


def require_limits(value: Any, limits: Mapping[str, Any], where: str) -> None:
    """Refuse a number that is not finite, or outside `limits` (see `key`); what is not a number passes.

    Raises:
        UserError: the message begins with `where`.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{where}: {value} is too large")
    if not math.isfinite(value):
        raise UserError(f"{where}: must be a finite number, got {value}")
    for name, (words, holds) in LIMITS.items():
        if limits.get(name) is not None and not holds(value, limits[name]):
            why = f"; {limits['why']}" if limits.get("why") else ""
            raise UserError(f"{where}: must be {words} {limits[name]}, got {value}{why}")


def _join(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)
