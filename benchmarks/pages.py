"""Put the figures of benchmarks/figures/*.json into docs/performance.md: python benchmarks/pages.py

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`, where NAME.json is what a benchmark wrote with `-o`.
"""

import json
import re
import sys
from pathlib import Path

from common import table

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "figures"
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with the tables of its figures."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{figures(block[2])}\n\n{block[3]}", text)


def figures(name: str) -> str:
    """The table of a file, and the machine it is from."""
    found = json.loads((FIGURES / f"{name}.json").read_text())
    machine = found["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    peak = f", {found['peak']}" if "peak" in found else ""
    about = f"{machine['device']}, {threads}, torch {machine['torch']}, ldm_dkdm {machine['ldm_dkdm']}{peak}."
    return f"{table(found['rows'])}\n\n{about}"


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
