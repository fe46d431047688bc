"""Configuration files: read, merge and validate YAML."""

import copy
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_dkdm.config.batches import SECTIONS, divided
from ldm_dkdm.config.checked import Section, convert, hints_of, is_required, parse, unwrap
from ldm_dkdm.config.effects import refuse_idle, require_effects
from ldm_dkdm.config.limits import require_plain_numbers
from ldm_dkdm.config.other_names import UnknownKey
from ldm_dkdm.config.overrides import NOT_YAML, dotlist, read_overrides, resolved
from ldm_dkdm.config.recipes import find_config, find_shipped
from ldm_dkdm.config.references import bad_reference
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, FirstStageCard, FirstStageRun, ModelCard, NewNetworkConfig
from ldm_dkdm.config.text import plain_values, quoted, written
from ldm_dkdm.errors import OtherRun, UserError, legible, nearest
from ldm_dkdm.files import read_text
from ldm_dkdm.reporting import logger

__all__ = [
    "RUN_KIND",
    "card_kind",
    "convert",
    "fits",
    "load_config",
    "nearest",
    "parse",
    "read_card",
    "read_overrides",
    "read_yaml",
    "to_yaml",
]

if TYPE_CHECKING:  # the default of a type variable is Python 3.13's
    from typing_extensions import TypeVar as DefaultingTypeVar

    T = DefaultingTypeVar("T", bound=Section, default=DistillRun)
else:
    T = TypeVar("T", bound=Section)
Card = TypeVar("Card", ModelCard, FirstStageCard)
DESCRIPTIONS = ("model_index.json", "config.yaml", "student/config.yaml", "model/config.yaml")  # mark a whole model
RUNS = (DistillRun, DiffusionRun, FirstStageRun)
RUN_KIND = "a run folder without a saved model"
LONGEST = 4_000_000  # bytes of a config


def load_config(
    base: str | Path | Sequence[str | Path],
    overrides: str | Sequence[str] = (),
    schema: type[T] = DistillRun,  # type: ignore[assignment]  # the default of T
    *,
    of_run: bool = False,
) -> T:
    """Merge YAML files left to right, then `key=value` overrides, and validate.

    Args:
        base: one path or several, or names of shipped recipes such as `ffhq256`.
        overrides: dotted, such as `distill.batch_size=8`; one may be a text.
        schema: the dataclass of the expected sections; default: a distillation run.
        of_run: the run exists, and an older version may have begun it with keys that have no effect.

    Raises:
        UserError: an argument of another type, a missing or unreadable file, an unknown key, a value of the wrong type
            or range, a key that another one leaves without effect.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    for name, value, wanted in (
        ("base", base, "a path or name, or a list of them"),
        ("overrides", overrides, "text or a list of texts"),
    ):
        if not isinstance(value, (str, Path, Sequence)):
            raise UserError(f"{name}: expected {wanted}, got a value of type {type(value).__name__}")
    files = [find_config(name) for name in ([base] if isinstance(base, (str, Path)) else base)]
    parts = [_unwrap_sections(part, schema) for part in _parts(files, overrides, schema)]
    try:
        recipe = _without_architecture(functools.reduce(_merge, parts[:-1]), parts[-1])
        merged = _merge(recipe, parts[-1])
        tree = resolved(merged)
    except OmegaConfBaseException as error:
        raise bad_reference(error, overrides, files, parts) from error
    except TypeError as error:
        sources = f"{files[-1]} {' '.join(overrides)}".strip()
        raise UserError(
            f"{sources}: a list or section cannot take this form ({error}); give lists whole: key=[1,2]"
        ) from error
    _refuse_other_scripts(tree, schema, files)
    for name in (name for name in SECTIONS if isinstance(tree.get(name), Mapping)):
        trainer = tree.get("trainer")
        tree[name] = divided(tree[name], trainer if isinstance(trainer, Mapping) else {}, f"{name}.")
    try:
        config = parse(schema, tree, "")
    except UnknownKey as error:
        raise error.within(schema) from error
    if schema in RUNS and not of_run:
        require_effects(tree, config)
        refuse_idle(parts, config)
    return config


def _parts(files: Sequence[Path], overrides: Sequence[str], schema: Any) -> list[DictConfig]:
    """The files and the overrides as trees; a file that holds only a student may be the model of a training."""
    known = {"student": NewNetworkConfig, **hints_of(schema)}
    return [*(_shared(file, known) for file in files), dotlist(overrides, known)]


def _refuse_other_scripts(tree: Mapping[str, Any], schema: Any, files: Sequence[Path]) -> None:
    """Refuse a config of another kind of run as a whole, before its keys are refused one by one."""
    for file in files:
        if _is_of_other_code(_shared(file)):
            raise UserError(
                f"{file}: made for another code's scripts; docs/coming-from-dkdm.md has our keys for theirs, and its "
                "unet_config can be pasted into a section such as student"
            )
    fitting = [run for run in RUNS if fits(tree, run)]
    if schema in RUNS and fitting and schema not in fitting:
        raise OtherRun(" ".join(map(str, files)), fitting[0], schema)


def _is_of_other_code(tree: Mapping[str, Any]) -> bool:
    """Whether a config has the sections of CompVis's main.py or of the public DKDM code."""
    teacher, model = tree.get("teacher"), tree.get("model")
    return (
        "lightning" in tree
        or (isinstance(teacher, Mapping) and bool({"tempfile", "iter_choice"} & set(teacher)))
        or (isinstance(model, Mapping) and "base_learning_rate" in model)
    )


def fits(tree: Mapping[str, Any], run: Any) -> bool:
    """Whether a tree has the sections of a script's config, and no others."""
    fields = dataclasses.fields(run)
    needed = {f.name for f in fields if is_required(f)}
    return needed <= set(tree) <= {f.name for f in fields}


def _merge(before: DictConfig, after: DictConfig) -> DictConfig:
    """Merge as OmegaConf does, but drop keys of the earlier `target`, without `budget`, or of the earlier schedule."""
    if not after:
        return before
    replaced_keys = []
    for section, node in after.items():
        old = before.get(section)
        if not (isinstance(node, DictConfig) and isinstance(old, DictConfig)):
            continue
        if "target" in node and node.target != old.get("target"):
            replaced: tuple[str, ...] = ("params", "target", "budget", "init")
        elif "schedule" in node and node.schedule != old.get("schedule", "scaled_linear"):
            replaced = ("beta_start", "beta_end", "betas")
        elif node.get("betas") is not None:
            replaced = ("schedule", "num_timesteps", "beta_start", "beta_end")
        else:
            replaced = ("params", "target") if "budget" in node else ()
        replaced_keys += [(section, key) for key in replaced if key in old]
    before = before.copy() if replaced_keys else before
    for section, key in replaced_keys:
        del before[section][key]
    return cast(DictConfig, OmegaConf.merge(before, after))


def _without_architecture(recipe: DictConfig, overrides: DictConfig) -> DictConfig:
    """Drop what a recipe says of its own teacher where `teacher.ckpt=FOLDER` names another, which describes itself."""
    before: Any = recipe.get("teacher") or {}
    given: Any = overrides.get("teacher") or {}
    path = find_shipped(str(given.get("ckpt", ""))) if given else Path()
    network = (path / "config.json").is_file()
    whole = any((path / name).is_file() for name in DESCRIPTIONS)
    if "ckpt" not in given or given.ckpt == before.get("ckpt") or not (network or whole):
        return recipe
    keys = {f"teacher.{key}" for key in ("target", "params") if before.get(key)}
    keys |= {key for key in ("diffusion", "first_stage") if recipe.get(key)} if whole else set()
    recipe = recipe.copy()
    dropped = sorted(key for key in keys if OmegaConf.select(overrides, key) is None)
    unused_keys = [key for key in dropped if _says_something(OmegaConf.select(recipe, key))]
    for key in dropped:
        section, _, name = key.rpartition(".")
        del (recipe[section] if section else recipe)[name]
    if unused_keys:
        logger.warning("teacher.ckpt: %s describes itself; the recipe's %s are not used", path, ", ".join(unused_keys))
    return recipe


def _says_something(node: Any) -> bool:
    """Whether a part of a config holds more than nulls, as a section without a key does in the config of a run."""
    return any(map(_says_something, node.values())) if isinstance(node, DictConfig) else node is not None


def _unwrap_sections(part: DictConfig, schema: type) -> DictConfig:
    """Turn a pasted `unet_config` into target and params before the merge, so that a later file can replace them.

    A file that holds only a student is the model of a training on images.
    """
    tree: Any = OmegaConf.to_container(part)
    if schema is DiffusionRun and set(tree) == {"student"}:
        tree = {"model": tree["student"]}
    plain = {k: unwrap(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    changed = part.keys() != plain.keys() or any(plain[key] is not tree[key] for key in tree)
    return OmegaConf.create(plain) if changed else part


def read_yaml(path: Path, hint: Mapping[str, Any] | None = None) -> DictConfig:
    """The mapping in a YAML file; the values of text keys in `hint` (`text.quoted`) are kept as typed.

    Without a `hint` nobody knows which values are texts, and numbers may look like anything.

    Raises:
        UserError: no such file, not YAML, more than a config needs (`config.limits`), or not a mapping.
    """
    return copy.deepcopy(_shared(path, hint))


def _shared(path: Path, hint: Mapping[str, Any] | None = None) -> DictConfig:
    """What `read_yaml` gives, the same object for all who ask for it, so that nobody may change it."""
    if not path.is_file():
        raise UserError(f"{path}: " + ("is a folder; name a file in it" if path.is_dir() else "no such config file"))
    try:
        node = _loaded(read_text(path, LONGEST), None if hint is None else tuple(hint.items()))
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {legible(' '.join(str(error).split()), 500)}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: a config is a mapping of sections, this file is not")
    return node


# a command reads a model's config several times, and a copy takes a third of a reading
@functools.lru_cache(maxsize=32)
def _loaded(text: str, hint: tuple[tuple[str, Any], ...] | None) -> Any:
    """The content of a YAML text; None where it is a number alone."""
    text = quoted(text, None if hint is None else dict(hint))
    if hint is not None:
        require_plain_numbers(text)
    try:
        return OmegaConf.load(io.StringIO(text))
    except OSError:
        return None


def read_card(path: Path, schema: type[Card]) -> Card:
    """Read and validate the config.yaml of a model folder."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model folder holds config.yaml and its weights")
    tree = _shared(path)
    if _refers(OmegaConf.to_container(tree, resolve=False)):
        raise UserError(f"{path}: a model folder's config holds plain values, no ${{...}}")
    found = _kind(tree)
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
    """The kind of folder that a config.yaml describes; None if its keys do not show it."""
    return _kind(_shared(path))


def _kind(tree: DictConfig) -> str | None:
    if "network" in tree:
        return ModelCard.KIND
    if "trainer" in tree:
        return RUN_KIND
    return FirstStageCard.KIND if {"weights", "target"} <= set(tree) else None


def to_yaml(config: Any) -> str:
    """A validated config as YAML text."""
    return written(plain_values(config))
