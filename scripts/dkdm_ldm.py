"""Distil a diffusion model without data: python scripts/dkdm_ldm.py --base configs/X.yaml [key=value ...]"""

from ldm_dkdm.device import is_first_rank
from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse, then plan or distil, then say where the student lies."""
    from ldm_dkdm.commands.arguments import read_arguments, training_parser
    from ldm_dkdm.config.schema import DistillRun

    parser = training_parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="print what the run will cost, and stop")
    run = read_arguments(parser, DistillRun)  # its mistakes before the slow imports

    from ldm_dkdm.training.from_teacher import distill
    from ldm_dkdm.training.plan import print_plan

    if run.options.plan:
        print_plan(run.config)
        return
    distill(run.config, run.folder, run.resumed)
    if is_first_rank():
        print(f"student: {run.folder.model}")


if __name__ == "__main__":
    run_cli(main)
