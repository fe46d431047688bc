"""Keep the text of text keys as it was typed, where YAML would read a number or a flag: 1.10, 007, 12:30, on."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ldm_dkdm.config.checked import hints_of
from ldm_dkdm.config.limits import LOADER, require_modest

NULL = "tag:yaml.org,2002:null"


def quoted(text: str, hint: Any) -> str:
    """A YAML text with quotes around the values of text keys, so that a YAML reader keeps them.

    Args:
        text: a YAML document.
        hint: the type of its content: a dataclass, a mapping of key -> type, or any type hint.

    Raises:
        UserError: more than a config needs (`config.limits`).
        yaml.YAMLError: the text is not YAML.
    """
    require_modest(text)  # libyaml composes by recursion
    root = yaml.compose(text, Loader=LOADER)
    found = {} if root is None else {node.end_mark.index: node for node in _texts(root, hint, set())}
    for end, node in sorted(found.items(), reverse=True):
        start = end - len(node.value)
        if text[start:end] == node.value:  # written on one line, as every number and flag is
            text = text[:start] + json.dumps(node.value, ensure_ascii=False) + text[end:]
    return text


def quoted_override(item: str, hint: Any) -> str:
    """A `key=value` whose value is kept as typed, where `key` is a text key.

    Quotes around the value are YAML's, and null means null.

    Raises:
        yaml.YAMLError: the value of a section is not YAML.
    """
    key, _, value = item.partition("=")
    for name in key.split("."):
        hint = _keys(hint).get(name)
    if not _is_text(hint):
        return f"{key}={quoted(value, hint)}" if _keys(hint) else item
    return item if _is_yaml(value, hint) else f"{key}={json.dumps(value.strip(), ensure_ascii=False)}"


def _is_yaml(value: str, hint: Any) -> bool:
    """Whether a whole value is one quoted scalar, or null."""
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return False
    if not isinstance(node, yaml.ScalarNode):
        return node is None
    return node.style in ("'", '"') or _is_null(node, hint)


def _is_null(node: yaml.ScalarNode, hint: Any) -> bool:
    """Whether a scalar means null; at a key that must hold text, ~ is the home folder."""
    return node.tag == NULL and not (hint is str and node.value == "~")


def _texts(node: yaml.Node, hint: Any, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """The unquoted scalars at text keys, null excepted."""
    if isinstance(node, yaml.ScalarNode):
        if _is_text(hint) and not node.style and not _is_null(node, hint):
            yield node
    elif isinstance(node, yaml.MappingNode) and id(node) not in seen:
        seen = seen | {id(node)}  # an anchor may hold itself
        for key, value in node.value:
            yield from _texts(value, hint if key.value == "<<" else _keys(hint).get(key.value), seen)


def _is_text(hint: Any) -> bool:
    return hint is str or typing.get_origin(hint) is typing.Literal or str in _options(hint)


def _keys(hint: Any) -> Mapping[str, Any]:
    """The keys of a section and their types; empty for another type."""
    if isinstance(hint, Mapping):
        return hint
    section = next((option for option in (hint, *_options(hint)) if dataclasses.is_dataclass(option)), None)
    if section is None:
        return {}
    keys = hints_of(section)
    wrapped = dict.fromkeys(("unet_config", "first_stage_config"), section)  # CompVis's wrapping of target and params
    return {**keys, **wrapped} if "target" in keys else keys


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else ()
