"""Measure a student against its teacher, without data: python scripts/evaluate.py -r RUN [--teacher DIR]"""

import json
from pathlib import Path

from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.errors import UserError, run_cli


def main() -> None:
    """Parse, measure, print and write the figures."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "-r", "--resume", type=Path, required=True, metavar="RUN", help="run or model folder of the student"
    )
    parser.add_argument("--teacher", type=Path, help="the teacher's model folder; default: the one in the run's config")
    parser.add_argument(
        "-n",
        "--n_samples",
        type=int,
        default=1000,
        help="pictures for the Frechet distance, 65 or more; 0 leaves it out",
    )
    parser.add_argument("-c", "--custom_steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--chains", type=int, default=32, help="held-out ancestral chains of the teacher")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("-o", "--out", type=Path, help="JSON file; default: evaluation.json beside the student")
    arguments = parser.parse_args()
    if arguments.chains < 1 or arguments.batch_size < 1 or arguments.seed < 0:
        raise UserError("--chains and --batch_size must be at least 1, --seed at least 0")
    if arguments.n_samples != 0 and arguments.n_samples < 65:
        raise UserError("--n_samples: at least 65, the distance uses 64 principal components; or 0")

    from ldm_dkdm.checkpoints.folder import read_card_of
    from ldm_dkdm.config.schema import ModelCard
    from ldm_dkdm.evaluation.student import evaluate
    from ldm_dkdm.files import write_text
    from ldm_dkdm.training.card import FIGURES, PER_T, write_readme

    figures, home = evaluate(arguments)
    for name, value in figures.items():
        if name != PER_T:
            print(f"{name}: {value}")
    out = arguments.out or home / FIGURES
    write_text(out, json.dumps(figures, indent=2) + "\n")
    print(f"{out}: these and the eps error of every t")
    if arguments.out is None and "teacher_sha256" in read_card_of(home, ModelCard).info:
        write_readme(home, read_card_of(home, ModelCard))


if __name__ == "__main__":
    run_cli(main)
