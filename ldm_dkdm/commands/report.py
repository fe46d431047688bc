"""Write one page about runs, finished or not: dkdm report RUN [RUN ...] [-o report.html]"""

import argparse
from pathlib import Path

from ldm_dkdm.commands.places import require_replaceable, require_writable
from ldm_dkdm.files import expanded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs and the page."""
    parser.add_argument("runs", nargs="+", metavar="RUN", type=expanded, help="run folder; several are compared")
    parser.add_argument("-o", "--out", type=expanded, help="default: report.html, of one run in its folder")


def run(options: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from ldm_dkdm.reports.page import REPORT, write_report

    alone = len(options.runs) == 1
    page = options.out or (options.runs[0] / REPORT if alone else Path(REPORT))
    require_writable(page, "-o")
    require_replaceable(page, "-o", "an HTML page")
    print(write_report(options.runs, page))
