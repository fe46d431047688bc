"""Put the figures of benchmarks/figures/*.json into docs/performance.md: python benchmarks/pages.py

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`, where NAME.json is what a benchmark wrote with `-o`.
The file of a card may be missing; the page then says so.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import table
from gpu import TABLES

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "figures"
PAGE = ROOT / "docs" / "performance.md"
MISSING = {"gpu": "No figure of a GPU is here."}
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with the tables of its figures."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{figures(block[2])}\n\n{block[3]}", text)


def figures(name: str) -> str:
    """The tables of a file, and the machine it is from."""
    path = FIGURES / f"{name}.json"
    if name in MISSING and not path.exists():
        return MISSING[name]
    found = json.loads(path.read_text())
    machine = found["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    peak = f", {found['peak']}" if "peak" in found else ""
    about = f"{machine['device']}, {threads}, torch {machine['torch']}, ldm_dkdm {machine['ldm_dkdm']}{peak}."
    shown = {key: title for key, title in TABLES.items() if found.get(key)}
    tables = [
        f"{title}:\n\n{table(found[key])}" if len(shown) > 1 else table(found[key]) for key, title in shown.items()
    ]
    return "\n\n".join([*tables, about, *notes(found)])


def notes(found: Mapping[str, Any]) -> list[str]:
    """What a card's figures depend on and lack."""
    if "peak_flops" not in found:
        return []
    speeds = ", ".join(f"{1e-12 * speed:.3g} TFLOP/s in {kind}" for kind, speed in found["peak_flops"].items())
    compiled = "compiled" if found["compiled"] else "nothing is compiled"
    reasons: dict[str, list[str]] = {}
    for name, why in found["left_out"].items():
        reasons.setdefault(why, []).append(name)
    without = [f"Without figures ({why}): {'; '.join(names)}." for why, names in reasons.items()]
    ahead = f" ({found['compiled_ahead']} before)" if "compiled_ahead" in found else ""
    facts = f"Matrix products of the same run: {speeds}; {compiled}{ahead}; {found['rounds']} rounds."
    return [facts, *found.get("notes", []), *without]


def main() -> None:
    """Write the page, or say with `--check` whether it is up to date."""
    text = PAGE.read_text()
    new = filled(text)
    if "--check" in sys.argv[1:]:
        sys.exit(f"{PAGE}: not up to date; run python benchmarks/pages.py" if new != text else 0)
    PAGE.write_text(new)
    print(PAGE)


if __name__ == "__main__":
    main()
