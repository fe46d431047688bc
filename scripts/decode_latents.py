"""Decode latents: python scripts/decode_latents.py LATENTS.{npz,pt,safetensors} --first_stage DIR -o OUT"""

from pathlib import Path

from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.errors import UserError, run_cli


def main() -> None:
    """Parse, decode, write a grid, PNG files and an ADM-style .npz."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "latents", type=Path, help="(N,C,h,w): arr_0 of an .npz, or the one tensor of a .pt or .safetensors"
    )
    parser.add_argument("--first_stage", type=Path, required=True, metavar="DIR", help="first-stage folder")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--scale_factor", type=float, help="if not the folder's own")
    parser.add_argument("--batch_size", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size: must be at least 1, got {arguments.batch_size}")
    if arguments.scale_factor is not None and arguments.scale_factor <= 0:
        raise UserError(f"--scale_factor: must be above 0, got {arguments.scale_factor}")

    from ldm_dkdm.commands.decode import decode_file

    count = decode_file(
        arguments.latents, arguments.first_stage, arguments.out, arguments.scale_factor, arguments.batch_size
    )
    print(f"{count} images: {arguments.out}")


if __name__ == "__main__":
    run_cli(main)
