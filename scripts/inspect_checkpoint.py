"""What is in a checkpoint: python scripts/inspect_checkpoint.py FILE [--config]"""

import argparse
from pathlib import Path

from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse and print; nothing in the file runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="a .ckpt, .pt or .safetensors")
    parser.add_argument("--config", action="store_true", help="print config sections to paste instead")
    arguments = parser.parse_args()

    from ldm_dkdm.runs.inspect import print_report

    print_report(arguments.file, arguments.config)


if __name__ == "__main__":
    run_cli(main)
