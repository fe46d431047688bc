"""Configuration files: load, merge, validate, build."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_dkdm.config.schema import DiffusionRun, DistillRun, FirstStageCard, FirstStageRun, ModelCard
from ldm_dkdm.errors import UserError

T = TypeVar("T")
LARGEST = 2**63  # of whole numbers
RUNS = (DistillRun, DiffusionRun, FirstStageRun)


def load_config(
    base: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), schema: type[T] = DistillRun
) -> T:
    """Merge YAML files left to right, then `key=value` overrides, and validate.

    Args:
        base: one path or several.
        overrides: dotted, such as `distill.batch_size=8`.
        schema: the dataclass of the expected sections; default: a distillation run.

    Raises:
        UserError: a missing or unreadable file, an unknown key, a value of the wrong type or range.
    """
    files = [base] if isinstance(base, (str, Path)) else list(base)
    parts = [_unwrap_sections(part, schema) for part in [*map(read_yaml, map(Path, files)), _dotlist(overrides)]]
    try:
        tree = OmegaConf.to_container(reduce(_merge, parts), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{files[-1]}: {error}") from error
    except TypeError as error:
        said = f"{files[-1]} {' '.join(overrides)}".strip()
        raise UserError(
            f"{said}: a list or section cannot take this form ({error}); give lists whole: key=[1,2]"
        ) from error
    _refuse_other_scripts(tree, schema, files)
    return parse(schema, tree, "")


def _refuse_other_scripts(tree: Mapping[str, Any], schema: type, files: Sequence[Path]) -> None:
    """A whole config of another script is named as that, and not key by key."""
    fitting = [run for run in RUNS if fits(tree, run)]
    if schema in RUNS and fitting and schema not in fitting:
        raise UserError(
            f"{' '.join(map(str, files))}: made for scripts/{fitting[0].SCRIPT}, and this is {schema.SCRIPT}"
        )


def fits(tree: Mapping[str, Any], run: type) -> bool:
    """Whether a tree has the sections of a script's config, and no others."""
    fields = dataclasses.fields(run)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    return needed <= set(tree) <= {f.name for f in fields}


def _merge(before: DictConfig, after: DictConfig) -> DictConfig:
    """OmegaConf's merge, but another `target` or a `budget` inherits nothing of the network before it."""
    before = before.copy()
    for section, node in after.items():
        old = before.get(section)
        if not (isinstance(node, DictConfig) and isinstance(old, DictConfig)):
            continue
        if "target" in node and node.target != old.get("target"):
            replaced = ("params", "target", "budget", "init")
        else:
            replaced = ("params", "target") if "budget" in node else ()
        for key in replaced:
            old.pop(key, None)
    return OmegaConf.merge(before, after)


def _unwrap_sections(part: DictConfig, schema: type) -> DictConfig:
    """A pasted `unet_config` is target and params before files are merged, so that a later file can replace them.

    A file of nothing but a student says what a training on data trains too.
    """
    tree = OmegaConf.to_container(part)
    if schema is DiffusionRun and set(tree) == {"student"}:
        tree = {"model": tree["student"]}
    return OmegaConf.create({k: _unwrap(v) if isinstance(v, Mapping) else v for k, v in tree.items()})


def read_yaml(path: Path) -> DictConfig:
    """The mapping in a YAML file."""
    if not path.is_file():
        raise UserError(f"{path}: " + ("is a folder; name a file in it" if path.is_dir() else "no such config file"))
    try:
        node = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: a config is a mapping of sections, this file is not")
    return node


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item or item.startswith(("=", "-")):
            raise UserError(f"'{item}': overrides look like key=value, for example trainer.max_steps=1000")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"overrides {' '.join(overrides)}: {error}") from error


def read_card(path: Path, schema: type[T]) -> T:
    """Read and validate the config.yaml of a model folder."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model folder holds config.yaml and its weights")
    if _refers(OmegaConf.to_container(read_yaml(path), resolve=False)):
        raise UserError(f"{path}: a model folder's config holds plain values, no ${{...}}")
    found = card_kind(path)
    if found and found != schema.KIND:
        raise UserError(f"{path.parent}: is {found}, not {schema.KIND}")
    try:
        return load_config(path, schema=schema)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _refers(node: Any) -> bool:
    """Whether a tree of plain values holds an interpolation, which could read the environment."""
    if isinstance(node, str):
        return "${" in node
    if isinstance(node, Mapping):
        return any(_refers(item) for pair in node.items() for item in pair)
    return isinstance(node, Sequence) and any(map(_refers, node))


def card_kind(path: Path) -> str | None:
    """What the folder of a config.yaml is, if its keys tell."""
    tree = read_yaml(path)
    if "network" in tree:
        return ModelCard.KIND
    if "trainer" in tree:
        return "a run's folder without a student/ (it comes with the first save)"
    return FirstStageCard.KIND if {"weights", "target"} <= set(tree) else None


def to_yaml(config: Any) -> str:
    """A validated config as YAML text."""
    return OmegaConf.to_yaml(dataclasses.asdict(config))


def parse(schema: type[T], node: Any, where: str) -> T:
    """Turn a tree of plain values into the dataclass `schema`; `where` prefixes keys in messages."""
    if not isinstance(node, Mapping):
        raise UserError(f"{where or 'config'}: expected a section with keys, got {node!r}")
    node = _unwrap(node)
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in node:
        if key not in fields:
            raise UserError(f"{_join(where, key)}: unknown key{nearest(str(key), fields)}")
    hints = typing.get_type_hints(schema)
    values = {}
    for name, field in fields.items():
        if name in node:
            values[name] = convert(hints[name], node[name], _join(where, name))
            _check_range(values[name], field.metadata, _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            key = _join(where, name) + (".KEY" if dataclasses.is_dataclass(hints[name]) else "")
            raise UserError(f"{_join(where, name)}: missing; set it in a --base file or as {key}=...")
    return schema(**values)


def _unwrap(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Accept CompVis's `unet_config: {target, params}` and `first_stage_config` in place of target and params."""
    for key in ("unet_config", "first_stage_config"):
        inner = node.get(key)
        if isinstance(inner, Mapping):
            node = {**{k: v for k, v in node.items() if k != key}, **inner}
    return node


def convert(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        fitting = [o for o in options if o is type(value)] or [o for o in options if o is not type(None)]
        return convert(fitting[0], value, where)
    if typing.get_origin(hint) is typing.Literal:
        if str(value) not in options:
            raise UserError(f"{where}: '{value}' is not one of {', '.join(options)}")
        return str(value)
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)
    kind = typing.get_origin(hint) or hint
    if kind is Sequence:
        return _sequence(options[0], value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # YAML reads a run's name such as 2024 as a number
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {_NAMES[kind]}, got {value!r}")
    return value


def _sequence(item: type, value: Any, where: str) -> list[Any]:
    wanted = f"a list, every entry {_NAMES[item]}"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{where}: expected {wanted}, got {value!r}")
    return [convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value)]


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"} | dict.fromkeys(
    (dict, Mapping), "a section with keys"
)


def _check_range(value: Any, limits: Mapping[str, float], where: str) -> None:
    if value is None:
        return
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{where}: {value} is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: must be a finite number, got {value}")
    if "above" in limits and not value > limits["above"]:
        raise UserError(f"{where}: must be above {limits['above']}, got {value}")
    if "min" in limits and not value >= limits["min"]:
        raise UserError(f"{where}: must be at least {limits['min']}, got {value}")
    if "below" in limits and not value < limits["below"]:
        raise UserError(f"{where}: must be below {limits['below']}, got {value}")
    if "max" in limits and not value <= limits["max"]:
        raise UserError(f"{where}: must be at most {limits['max']}, got {value}")


def nearest(key: str, valid: Mapping[str, Any]) -> str:
    """A hint that names the nearest valid key, or all of them."""
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid keys: {', '.join(valid)}"


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
