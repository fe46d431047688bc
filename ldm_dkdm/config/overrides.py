"""`key=value` items of a command line: read, checked, and merged into a tree."""

from collections.abc import Sequence
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_dkdm.config.limits import DEPTH, require_modest, require_plain_numbers, require_short_references
from ldm_dkdm.config.references import bad_reference
from ldm_dkdm.config.text import quoted_override
from ldm_dkdm.errors import MALFORMED, UserError

NOT_YAML = (yaml.YAMLError, OmegaConfBaseException, *MALFORMED)


def resolved(node: DictConfig) -> Any:
    """Plain values, with the references ${key} replaced by what they name."""
    require_short_references(OmegaConf.to_container(node))
    return OmegaConf.to_container(node, resolve=True)


def read_overrides(overrides: Sequence[str], hint: Any = None) -> dict[str, Any]:
    """`key=value` items as a tree of plain values; those of text keys in `hint` (`text.quoted`) are kept as typed.

    Raises:
        UserError: an item of another form, a value that is not YAML, or a reference to nothing.
    """
    try:
        return cast(dict[str, Any], resolved(dotlist(overrides, hint)))
    except OmegaConfBaseException as error:
        raise bad_reference(error, overrides) from error


def dotlist(overrides: Sequence[str], hint: Any = None) -> DictConfig:
    """`key=value` items as a tree, references unresolved.

    Raises:
        UserError: an item of another form, or a value that is not YAML.
    """
    items = [_checked_override(item, hint) for item in overrides]
    try:
        return OmegaConf.from_dotlist(items)
    except NOT_YAML as error:
        raise UserError(f"overrides {' '.join(overrides)}: {error}") from error


def _checked_override(item: str, hint: Any) -> str:
    """An override as OmegaConf should read it.

    Raises:
        UserError: another form, a value that is not YAML, or one that is more than a value or not plainly a number.
    """
    key, equals, value = item.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"'{item}': overrides look like key=value, for example trainer.max_steps=1000")
    if value.strip() == "???":
        raise UserError(f"{key}: ??? stands for a missing value; give one")
    if key.count(".") + key.count("[") > DEPTH:
        raise UserError(f"{key}: nests more than {DEPTH} sections")
    try:
        item = quoted_override(item, hint)
        require_modest(item.partition("=")[2])
        require_plain_numbers(item.partition("=")[2])
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    except NOT_YAML as error:
        raise UserError(f"overrides {item}: {error}") from error
    return item
