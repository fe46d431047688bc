"""Lists of every key of a configuration, for the terminal and for docs/options.md."""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from ldm_dkdm.config.checked import KINDS, LIMITS, Section, hints_of, is_required, names_of
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, FirstStageRun
from ldm_dkdm.errors import UserError, nearest

RUNS = (DistillRun, DiffusionRun, FirstStageRun)
INTRODUCTION = """# Options

Every key of the three training commands. A config file holds the sections; `section.key=value` on the command line
overrides one key. `dkdm COMMAND --keys [SECTION]` prints the same lists.
"""


@dataclass(frozen=True)
class Key:
    """A key in words: dotted name, kind of value with limits or choices, default in YAML, meaning."""

    name: str
    kind: str
    default: str
    meaning: str


def keys_of(schema: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a schema, a section before its keys; `prefix` is the section's dotted name with a dot."""
    for field in dataclasses.fields(schema):
        hint = hints_of(schema)[field.name]
        section = section_in(hint)
        kind = "section" if section else _kind(hint, field.metadata)
        yield Key(f"{prefix}{field.name}", kind, _default(field, section), field.metadata["help"])
        if section:
            yield from keys_of(section, f"{prefix}{field.name}.")


def section_in(hint: Any) -> type | None:
    """The section's class in a type hint such as `EarlyStopConfig | None`."""
    options = [hint, *typing.get_args(hint)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _default(field: dataclasses.Field[Any], section: type | None) -> str:
    if is_required(field):
        return "required"
    if field.default is MISSING:
        return "its keys' defaults" if section else "{}"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return f"[{', '.join(field.default)}]"
    return "null" if field.default is None else str(field.default)


def _kind(hint: Any, metadata: Mapping[str, Any]) -> str:
    """A type hint and its limits in words."""
    if "table" in metadata:
        listed = typing.get_origin(hint) is Sequence
        return f"{'list of any' if listed else 'one'} of {', '.join(names_of(metadata['table']))}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_kind(option, metadata) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    limits = [f"{words} {metadata[name]}" for name, (words, _) in LIMITS.items() if metadata.get(name) is not None]
    if typing.get_origin(hint) is Sequence:
        items = f"list of {metadata.get('length', '')}".strip() + f" {KINDS[typing.get_args(hint)[0]]}s"
        return ", each ".join([items, *limits[:1]]) + "".join(f", {limit}" for limit in limits[1:])
    kind = typing.get_origin(hint) or hint
    return ", ".join([KINDS[kind], *(limits if kind in (int, float) else ())])


def keys_text(schema: type, section: str | None = None) -> str:
    """The keys of a schema, or of one of its sections, as text for a terminal.

    Args:
        schema: a configuration, such as `DistillRun`.
        section: dotted name of a section or key; default: all.

    Raises:
        UserError: the schema has no such section.
    """
    keys = list(keys_of(schema))
    chosen = [key for key in keys if section is None or f"{key.name}.".startswith(f"{section}.")]
    if not chosen:
        sections = [key.name for key in keys if key.kind == "section"]
        hint = nearest(str(section), sections).replace("valid keys", "sections")
        raise UserError(f"'{section}' is not a section{hint}")
    return "\n".join(f"{key.name}  ({key.kind}; {_in_words(key)})\n    {key.meaning}" for key in chosen)


def _in_words(key: Key) -> str:
    return key.default if key.default == "required" else f"default: {key.default}"


def options_markdown() -> str:
    """The text of docs/options.md: the keys of the three training commands."""
    parts = [INTRODUCTION]
    seen: dict[tuple[str, type], str] = {}
    for run in RUNS:
        parts.append(f"## dkdm {run.COMMAND}\n\n{run.__doc__} Script: `scripts/{run.SCRIPT}`.\n")
        loose = [key for key in keys_of(run) if "." not in key.name and key.kind != "section"]
        parts += [f"{_table(loose)}\n"] if loose else []
        parts += [_section(run, field, seen) for field in dataclasses.fields(run)]
    return "\n".join(part for part in parts if part)


def _section(run: Any, field: dataclasses.Field[Any], seen: dict[tuple[str, type], str]) -> str:
    """A section's heading, meaning and table, or a reference to the command that has listed the same keys."""
    section = section_in(hints_of(run)[field.name])
    if section is None:
        return ""
    need = "Required." if is_required(field) else "Optional."
    head = f"### {run.COMMAND}: {field.name}\n\n{field.metadata['help']} {need}"
    first = seen.setdefault((field.name, section), run.COMMAND)
    if first != run.COMMAND:
        return f"{head} Keys: as in [{first}: {field.name}](#{first}-{field.name}).\n"
    return f"{head}\n\n{_table(list(keys_of(section, f'{field.name}.')))}\n"


def _table(keys: Sequence[Key]) -> str:
    rows = [f"| `{key.name}` | {key.kind} | `{key.default}` | {key.meaning} |" for key in keys]
    rows = [row.replace("`required`", "required").replace("`its keys' defaults`", "") for row in rows]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(options_markdown(), encoding="utf-8")
