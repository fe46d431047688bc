"""A model for other tools: python scripts/convert.py MODEL OUT --to diffusers | compvis | adm | safetensors"""

from pathlib import Path

from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse and convert."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", type=Path, help="run, model folder or training checkpoint")
    parser.add_argument("out", type=Path, help="the file (diffusers: folder) to write; it must not exist")
    parser.add_argument("--to", required=True, choices=("diffusers", "compvis", "adm", "safetensors"))
    arguments = parser.parse_args()

    from ldm_dkdm.commands.convert import convert

    convert(arguments.source, arguments.out, arguments.to)
    print(arguments.out)


if __name__ == "__main__":
    run_cli(main)
