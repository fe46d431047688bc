"""Bounds of YAML and of its references, checked before either is expanded: files are not trusted."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from ldm_dkdm.errors import UserError, legible

LENGTH = 1_000_000  # characters of a YAML text
DEPTH = 40  # sections and lists within each other
NODES = 10_000  # keys, values, sections and lists of a file, aliases expanded
EXPANDED = 1_000_000  # characters and nodes that references may expand to
REFERENCES = 20  # ${key} in a text
DIGITS = 40  # characters of a number
TEXT = "tag:yaml.org,2002:str"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
NUMBER_LIKE = re.compile(r"[-+]?[.0-9][0-9a-fA-FxXoO_:.+-]*")
WHOLE = r"(0|[1-9][0-9]{0,2}(_[0-9]{3})*|[1-9][0-9]*)"
PLAIN = re.compile(rf"[-+]?({WHOLE}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.\w+")
REFERENCE = re.compile(r"\$\{([^${}]*)\}")
KEPT = "oc.env:"  # the one resolver that is read: a variable of the environment


def require_modest(text: str) -> None:
    """Refuse a YAML text that is too long, too deep or too large, that names types of its own, or nests references.

    Raises:
        UserError: what is too much.
        yaml.YAMLError: the text is not YAML.
    """
    if len(text) > LENGTH:
        raise UserError(f"has {len(text)} characters, more than {LENGTH}")
    sizes: dict[str, int] = {}  # anchor -> expanded size of its node
    open_nodes: list[tuple[str | None, int]] = []  # anchor of each open section or list, and the count at its start
    count = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, start = open_nodes.pop()
            sizes |= {anchor: count - start} if anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"*{event.anchor} is an alias of what holds it, or of nothing")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            _require_no_tag(event)
            if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                _require_few_references(event.value)
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count))
            elif event.anchor:
                sizes[event.anchor] = 1
            count += 1
        if len(open_nodes) > DEPTH:
            raise UserError(f"nests more than {DEPTH} sections or lists")
        if count > NODES:
            raise UserError(f"holds more than {NODES} keys and values")


def _require_no_tag(event: Any) -> None:
    if event.tag not in (None, "!", TEXT):
        raise UserError(f"{event.tag} in line {event.start_mark.line + 1}: a value has no type of its own here")


def _require_few_references(text: str) -> None:
    """Refuse what takes OmegaConf long to read."""
    rest, count = REFERENCE.subn("", text)
    if "${" in rest:
        raise UserError(f"'{legible(text, 100)}' holds a reference in a reference, or one without an end")
    if count > REFERENCES:
        raise UserError(f"'{legible(text, 100)}' holds more than {REFERENCES} references")


def require_plain_numbers(text: str) -> None:
    """Refuse what YAML reads as a number although it does not look like one: 10:30, 1_000_, 010, 0x10.

    Raises:
        UserError: the number, and how to write it.
    """
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.ScalarEvent) and not event.style and NUMBER_LIKE.fullmatch(event.value):
            _require_plain(event.value)


def _require_plain(value: str) -> None:
    if len(value) > DIGITS and re.fullmatch(r"[-+]?[0-9_:.]+", value):
        raise UserError(f"{legible(value, 60)} is too long for a number")
    if PLAIN.fullmatch(value) or len(value) > DIGITS:
        return
    meant = OmegaConf.create({"value": yaml_value(value)}).value
    if isinstance(meant, (int, float)) and not isinstance(meant, bool):
        raise UserError(f"{value} is not plainly a number, YAML reads {meant}; write that, or '{value}' for a text")


def yaml_value(text: str) -> Any:
    """What a YAML reader makes of a short scalar."""
    return OmegaConf.from_dotlist([f"value={text}"]).value


def require_short_references(tree: Any) -> None:
    """Refuse references ${key} that expand to more than EXPANDED, or that are more than the name of a key.

    Args:
        tree: plain values, references unresolved.

    Raises:
        UserError: the text that holds the reference.
    """
    if any("${" in text for text in _texts(tree)):
        _Expansion(tree).of(tree, ())


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)


class _Expansion:
    """Counts what the references of a tree expand to, without expanding them."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.known: dict[tuple[str, ...], int | None] = {}  # None: being counted

    def of(self, node: Any, path: tuple[str, ...]) -> int:
        """Characters and nodes of what lies at a path, with its references expanded."""
        if path in self.known:
            size = self.known[path]
            if size is None:
                raise UserError(f"{'.'.join(path)}: refers to itself")
            return size
        self.known[path] = None
        if isinstance(node, Mapping):
            total = 1 + sum(self.of(value, (*path, str(key))) for key, value in node.items())
        elif isinstance(node, list):
            total = 1 + sum(self.of(value, (*path, str(i))) for i, value in enumerate(node))
        else:
            total = self._of_text(node, path) if isinstance(node, str) else 1
        if total > EXPANDED:
            raise UserError(f"{'.'.join(path) or 'config'}: its references expand to more than {EXPANDED} characters")
        self.known[path] = total
        return total

    def _of_text(self, text: str, path: tuple[str, ...]) -> int:
        return len(text) + sum(self._of_reference(name.strip(), path) for name in REFERENCE.findall(text))

    def _of_reference(self, name: str, path: tuple[str, ...]) -> int:
        if name.startswith(KEPT):
            return 1
        if ":" in name:
            raise UserError(f"{'.'.join(path)}: ${{{name}}}: only ${{key}} and ${{{KEPT}NAME}} are read")
        dots = len(name) - len(name.lstrip("."))
        place = [*path[: len(path) - dots]] if dots else []
        node: Any = self.tree
        for part in place:
            node = _child(node, part)
        for part in re.split(r"[.\[\]]+", name.strip(".[]")):
            if isinstance(node, str):  # a reference on the way: all that it names is counted
                break
            node, place = _child(node, part), [*place, part]
        return 1 if node is None else self.of(node, tuple(place))


def _child(node: Any, name: str) -> Any:
    if isinstance(node, Mapping):
        return next((value for key, value in node.items() if str(key) == name), None)
    if isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
        return node[int(name[:9])]
    return None
