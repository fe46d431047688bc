"""Sample pictures: python scripts/txt-free_sample.py -r RUN_OR_STUDENT_OR_CKPT -n 64 [-c STEPS] [-e ETA] [-v]"""

import argparse
import sys
from pathlib import Path

from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.errors import UserError, run_cli


def parse() -> argparse.Namespace:
    """-r -n -c -e -v -l mean what they mean in CompVis's sample script."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "-r",
        "--resume",
        required=True,
        nargs="+",
        metavar="PATH",
        help="run, model folder or Lightning .ckpt; two make a comparison",
    )
    parser.add_argument("-n", "--n_samples", type=int, default=64, help="number of images")
    parser.add_argument("-c", "--custom_steps", type=int, help="sampling steps; default: 200, with ddpm all of them")
    parser.add_argument("--sampler", choices=["ddim", "ddpm", "dpm-solver++"], default="ddim")
    parser.add_argument("-e", "--eta", type=float, default=0.0, help="DDIM's eta: 0 deterministic, 1 ancestral")
    parser.add_argument("-v", "--vanilla_sample", action="store_true", help="--sampler ddpm with every timestep")
    parser.add_argument("-l", "--logdir", type=Path, help="output folder; default: logs/samples/<model>")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on seed + i only")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[], help="class labels, in turn; default: by the seeds"
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0], help="classifier-free, for all -r or for each; 1: none"
    )
    parser.add_argument("--raw", action="store_true", help="of a training .ckpt: the raw weights, not their EMA")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz (arr_0, uint8 NHWC)")
    parser.add_argument("--latents", action="store_true", help="also write latents.safetensors")
    parser.add_argument("--no_png", action="store_true", help="no PNG per image, only the grid")
    parser.add_argument("--compare", type=Path, metavar="PNG", help="write a labelled grid of all -r beside each other")
    parser.add_argument("--first_stage", metavar="DIR", help="first-stage folder, if not the one the model points to")
    parser.add_argument("--precision", choices=["auto", "bf16", "32"], default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    arguments = parser.parse_args()
    if arguments.vanilla_sample and arguments.custom_steps is not None:
        print("-v takes every timestep; -c is left out of account", file=sys.stderr)
    if arguments.vanilla_sample:
        arguments.sampler, arguments.custom_steps = "ddpm", None
    elif arguments.custom_steps is None and arguments.sampler != "ddpm":
        arguments.custom_steps = 200
    return arguments


def main() -> None:
    """Parse, sample, say where the pictures lie."""
    arguments = parse()
    for name in ("n_samples", "custom_steps", "batch_size"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name}: must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.eta <= 1:
        raise UserError(f"--eta: must lie between 0 and 1, got {arguments.eta}")
    if arguments.eta and arguments.sampler != "ddim":
        raise UserError(f"--eta: has no effect with {arguments.sampler}; leave it out")
    if min(arguments.guidance) < 0:
        raise UserError(f"--guidance: must be at least 0, got {min(arguments.guidance)}")
    if arguments.compare and arguments.compare.suffix.lower() != ".png":
        raise UserError(f"--compare: {arguments.compare} must be a .png")
    if not 0 <= arguments.seed < 2**63 - arguments.n_samples:
        raise UserError(f"--seed: must be at least 0 and below 2^63, got {arguments.seed}")

    from ldm_dkdm.commands.sample import sample_all
    from ldm_dkdm.generate import SamplerConfig

    config = SamplerConfig(
        arguments.n_samples,
        arguments.batch_size,
        arguments.seed,
        arguments.custom_steps,
        arguments.eta,
        arguments.sampler,
        tuple(arguments.labels),
    )
    sample_all([Path(path) for path in arguments.resume], config, arguments)


if __name__ == "__main__":
    run_cli(main)
