"""What is in a checkpoint: python scripts/inspect_checkpoint.py PATH [--config]"""

from pathlib import Path

from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse and print; nothing in the file runs."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "file",
        type=Path,
        metavar="PATH",
        help="a .ckpt, .pt or .safetensors, or a run, model, first-stage or diffusers folder",
    )
    parser.add_argument("--config", action="store_true", help="print config sections to paste instead")
    arguments = parser.parse_args()

    from ldm_dkdm.commands.inspect import print_report

    print_report(arguments.file, arguments.config)


if __name__ == "__main__":
    run_cli(main)
