"""Print what `dkdm evaluate` has found: figures, what they were measured on, warnings, tables over runs."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded, write_text
from ldm_dkdm.reporting import in_home, logger

if TYPE_CHECKING:
    from ldm_dkdm.evaluation.measurement import Measurement

DIGITS = 12  # digits of a hash
NARROW, WIDE = 80, 100  # columns of the output; a terminal between them is filled, a log file is wide
USUAL = {"guidance": 1.0, "eta": 0.0, "lossy": 0, "resize": "none", "resized": "none"}  # what is not shown
HIDDEN = ("opened_from_sha256",)  # the result's files have it
PATHS = ("source", "opened_from", "statistics of")  # facts of which the end matters
LEAST = 4  # characters of a cell


def show(found: "Measurement") -> None:
    """Print the figures as a table, what they were measured on as another, and warnings on stderr."""
    from ldm_dkdm.evaluation.results import markdown

    values = [{"figure": name, "value": value} for name, value in found.figures.items() if not isinstance(value, dict)]
    print(markdown(["figure", "value"], values), end="\n\n")
    width = min(WIDE, max(NARROW, shutil.get_terminal_size((WIDE, 0)).columns))
    print("\n".join(measured_on(found.samples, found.reference, width)))
    for facts in found.features:
        own = _brief(facts)
        print(_wrapped("features", [own.pop("features"), *_named(own)], width))
    for warning in found.warnings:
        logger.warning(f"not comparable with published figures: {warning}")


def measured_on(samples: Mapping[str, Any], reference: Mapping[str, Any] | None, width: int) -> list[str]:
    """A table of the facts in which two sets differ, and a paragraph of those that both share; lines of a width."""
    from ldm_dkdm.checkpoints.card import AGREEMENT_BY

    sets = {"samples": _brief(samples), **({} if reference is None else {"reference": _brief(reference)})}
    by = {name: own.pop(AGREEMENT_BY) for name, own in sets.items() if AGREEMENT_BY in own}
    names = dict.fromkeys(name for own in sets.values() for name in own)
    shared = [n for n in names if len(sets) > 1 and len({own.get(n) for own in sets.values()}) == 1]
    differing = [name for name in names if name not in shared]
    lines = [_table(differing, sets, width)] if differing else []
    lines += [_wrapped("both", _named({name: sets["samples"][name] for name in shared}), width)] if shared else []
    return lines + [_wrapped(AGREEMENT_BY, [options], width) for options in by.values()]


def _table(names: Sequence[str], sets: Mapping[str, Mapping[str, str]], width: int) -> str:
    """A row per fact and a column per set, whose cells are cut so that the table has at most this width."""
    from ldm_dkdm.evaluation.results import markdown

    left = width - 4 - max(map(len, ["measured on", *names])) - 3 * len(sets)
    needed = {scope: max(len(scope), *(len(own.get(name, "")) for name in names)) for scope, own in sets.items()}
    rooms: dict[str, int] = {}
    for scope in sorted(sets, key=needed.__getitem__):  # a wide column takes what a narrow one leaves
        rooms[scope] = max(LEAST, min(needed[scope], left // (len(sets) - len(rooms))))
        left -= rooms[scope]
    cells = {
        name: {scope: _cut(name, own.get(name, ""), rooms[scope]) for scope, own in sets.items()} for name in names
    }
    return markdown(["measured on", *sets], [{"measured on": name} | row for name, row in cells.items()])


def _cut(name: str, value: str, room: int) -> str:
    """A value in its room: of paths the end is kept, of others the beginning."""
    if len(value) <= room:
        return value
    if name not in PATHS:
        return f"{value[: room - 3]}..."
    end = value[3 - room :]
    return f"...{end[max(0, end.find('/')) :]}"


def _brief(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts for the terminal: without those that are as usual or follow from others, and short."""
    kept = {name: value for name, value in facts.items() if value is not None and USUAL.get(name) != value}
    shown = {name: _short(name, value) for name, value in kept.items() if name not in HIDDEN}
    if shown.get("opened_from", "").startswith(shown.get("source", "/")):
        del shown["opened_from"]
    return {name: value for name, value in shown.items() if value}


def _short(name: str, value: Any) -> str:
    """A fact as text: hashes by their first digits, of statistics in a file the set that they are of."""
    from ldm_dkdm.checkpoints.averaging import UNSAID

    if name.endswith("sha256"):
        return str(value)[:DIGITS]
    if name == "parameters":
        return f"{value / 1e6:.4g} M"
    if name == "statistics of":
        own = value.get("source")
        return str(own.get("source", "")) if isinstance(own, Mapping) else ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if name in PATHS:
        return in_home(value)
    return "one set, EMA or raw unsaid" if value == UNSAID else str(value)


def _named(facts: Mapping[str, str]) -> list[str]:
    return [f"{name} {value}" for name, value in facts.items()]


def _wrapped(title: str, parts: Sequence[str], width: int) -> str:
    """`title: a; b; c` in lines of a width."""
    text = f"{title}: {'; '.join(parts)}"
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def add_row(results: Path, found: "Measurement") -> None:
    """Add a row to the CSV file of results, and say so."""
    from ldm_dkdm.evaluation.results import append_row, row_of

    added = append_row(results, row_of(found.record()))
    what = "a row with these figures" if added else "holds this row already, from an earlier call"
    print(f"{results}: {what}")


def print_table(paths: Sequence[str], out: Path | None) -> None:
    """Print figures of evaluated runs as Markdown, and write them to a file if it is named."""
    from ldm_dkdm.evaluation.results import table

    if not paths:
        raise UserError("--table: name the runs, or JSON files of evaluations")
    text = table(map(expanded, paths))
    print(text)
    if out is not None:
        write_text(out, f"{text}\n")
        print(f"\n{out}: the table")
