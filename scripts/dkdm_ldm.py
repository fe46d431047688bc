"""Distil a diffusion model without data: python scripts/dkdm_ldm.py --base configs/X.yaml [key=value ...]"""

from ldm_dkdm.cli import config_parser, is_first_rank, split_base
from ldm_dkdm.errors import UserError, run_cli


def main() -> None:
    """Parse, then plan or distil, then say where the student lies."""
    parser = config_parser(__doc__)
    parser.add_argument("--resume", metavar="RUN|last", help="go on with a run folder, with its own configuration")
    parser.add_argument("--plan", action="store_true", help="print what the run will cost, and stop")
    arguments = parser.parse_args()
    files, overrides = split_base(arguments)

    from ldm_dkdm.config import load_config

    if arguments.resume and files:
        raise UserError("--resume: a run has its own configuration; leave --base out (key=value still works)")
    if not arguments.resume and not files:
        raise UserError("--base: name at least one config file, for example --base configs/quickstart.yaml")
    config = load_config(files, overrides) if files else None  # its mistakes before the slow imports

    from ldm_dkdm.runs.distill import distill
    from ldm_dkdm.runs.loop import find_run, run_folder
    from ldm_dkdm.runs.plan import print_plan

    if config is None:
        folder = find_run(arguments.resume)
        config = load_config(folder.path / "config.yaml", overrides)
    else:
        folder = run_folder(config.logging, files[-1].stem)
    if arguments.plan:
        print_plan(config)
        return
    distill(config, folder, resumed=bool(arguments.resume))
    if is_first_rank():
        print(f"student: {folder.model}")


if __name__ == "__main__":
    run_cli(main)
