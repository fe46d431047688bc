"""Distil a diffusion model without data: python scripts/dkdm_ldm.py --base configs/X.yaml [key=value ...]"""

from ldm_dkdm.cli import is_first_rank
from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse, then plan or distil, then say where the student lies."""
    from ldm_dkdm.runs.arguments import read_arguments, training_parser
    from ldm_dkdm.schema import DistillRun

    parser = training_parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="print what the run will cost, and stop")
    run = read_arguments(parser, DistillRun)  # its mistakes before the slow imports

    from ldm_dkdm.runs.distill import distill
    from ldm_dkdm.runs.plan import print_plan

    if run.options.plan:
        print_plan(run.config)
        return
    distill(run.config, run.folder, run.resumed)
    if is_first_rank():
        print(f"student: {run.folder.model}")


if __name__ == "__main__":
    run_cli(main)
