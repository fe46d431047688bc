"""Keep the text of text keys as it was typed, where YAML would read a number or a flag: 1.10, 007, 12:30, on."""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

from ldm_dkdm.config.checked import Section, hints_of
from ldm_dkdm.config.limits import LOADER, TEXT, require_modest
from ldm_dkdm.errors import UserError

NULL = "tag:yaml.org,2002:null"
SWITCHES = ("y", "Y", "n", "N")  # flags to some readers of YAML 1.1
SIMPLE = re.compile(r"[\w.:+-]+")  # a scalar that may stand without quotes wherever an alias may


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
    root = yaml.compose(text, Loader=_Aliases if "&" in text and "*" in text else LOADER)
    found = [] if root is None else list(_scalars(root, hint, set()))
    changes = {n.end_mark.index: (n, json.dumps(n.value, ensure_ascii=False)) for n, is_text in found if is_text}
    for node, is_text in found:
        if isinstance(node, _Alias) and not is_text and node.origin in changes and SIMPLE.fullmatch(node.value):
            changes.setdefault(node.end_mark.index, (node, node.value))  # a number that a text key shares
    for end, (node, new) in sorted(changes.items(), reverse=True):
        start = node.start_mark.index if isinstance(node, _Alias) else end - len(node.value)
        if isinstance(node, _Alias) or text[start:end] == node.value:  # on one line, as every number and flag is
            text = text[:start] + new + text[end:]
    return text


class _Alias(yaml.ScalarNode):
    """The scalar that an alias stands for, at the alias's place; `origin`: where the scalar itself ends."""

    origin = -1


class _Aliases(yaml.SafeLoader):
    """Gives every alias of a scalar a node of its own."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; for an alias of a scalar one of its own."""
        event = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if event is None or not isinstance(node, yaml.ScalarNode):
            return node
        alias = _Alias(node.tag, node.value, event.start_mark, event.end_mark, node.style)
        alias.origin = node.end_mark.index
        return alias


def quoted_override(item: str, hint: Any) -> str:
    """A `key=value` whose value is kept as typed, where `key` is a text key or holds a list of texts.

    Quotes around the whole value are YAML's, and null means null.

    Raises:
        yaml.YAMLError: the value of a section is not YAML.
    """
    key, _, value = item.partition("=")
    for name in key.split("."):
        hint = _keys(hint).get(name)
    if not _is_text(hint):
        return f"{key}={quoted(value, hint)}" if _keys(hint) or _entry(hint) else item
    return item if _is_yaml(value, hint) else f"{key}={json.dumps(value.strip(), ensure_ascii=False)}"


def _is_yaml(value: str, hint: Any) -> bool:
    """Whether a value is nothing, null, or one quoted scalar, without a comment or an anchor."""
    value = value.strip()
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return False
    if not isinstance(node, yaml.ScalarNode):
        return not value
    if node.style in ("'", '"'):
        return value.startswith(node.style) and node.end_mark.index == len(value)
    return node.value == value and _is_null(node, hint)


def _is_null(node: yaml.ScalarNode, hint: Any) -> bool:
    """Whether a scalar means null; at a key that must hold text, ~ is the home folder."""
    return node.tag == NULL and not (hint is str and node.value == "~")


def _scalars(node: yaml.Node, hint: Any, seen: set[int]) -> Iterator[tuple[yaml.ScalarNode, bool]]:
    """The unquoted scalars, and whether each is at a text key and not null."""
    if isinstance(node, yaml.ScalarNode):
        if not node.style:
            yield node, _is_text(hint) and not _is_null(node, hint)
    elif isinstance(node, yaml.MappingNode) and id(node) not in seen:
        seen = seen | {id(node)}  # an anchor may hold itself
        for key, value in node.value:
            yield from _scalars(value, hint if key.value == "<<" else _keys(hint).get(key.value), seen)
    elif isinstance(node, yaml.SequenceNode) and id(node) not in seen:
        for value in node.value:
            yield from _scalars(value, _entry(hint), seen | {id(node)})


def _is_text(hint: Any) -> bool:
    return hint is str or typing.get_origin(hint) is typing.Literal or str in _options(hint)


def _entry(hint: Any) -> Any:
    """The type of a list's entries; None for another type."""
    lists = (option for option in (hint, *_options(hint)) if typing.get_origin(option) is Sequence)
    return next((typing.get_args(option)[0] for option in lists), None)


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


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes also the texts that OmegaConf reads as numbers, such as 1e-3."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write out a value that stands in two places at both."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A scalar, in quotes where it looks like a number."""
        return self.represent_scalar(TEXT, text, style="'" if text in SWITCHES or _is_number(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def written(tree: Any) -> str:
    """Plain values as a YAML text, as `OmegaConf.to_yaml` writes them: what looks like a number stays a text."""
    return str(yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


def _is_number(text: str) -> bool:
    for kind in (int, float):
        with suppress(ValueError):
            kind(text)
            return True
    return False


def plain_values(node: Any, where: str = "") -> Any:
    """A validated config, or a part of it, as mappings, lists and scalars.

    Raises:
        UserError: the key of a value that no file holds, such as a tensor among a network's params.
    """
    if isinstance(node, Section):
        node = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {key: plain_values(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
    if node is None or isinstance(node, (bool, bytes)):
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)  # subclasses, such as numpy.float64, as plain values
    if isinstance(node, Sequence):
        return [plain_values(value, f"{where}[{i}]") for i, value in enumerate(node)]
    raise UserError(f"{where}: a config holds plain numbers, texts and lists, not a value of {type(node)}")
