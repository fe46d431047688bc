"""Train a diffusion model on images (Alg. 2): python scripts/train_ldm.py --base configs/X.yaml [key=value ...]"""

from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse, train, say where the model lies."""
    from ldm_dkdm.commands.arguments import read_arguments, training_parser
    from ldm_dkdm.config.schema import DiffusionRun

    run = read_arguments(training_parser(__doc__), DiffusionRun)  # its mistakes before the slow imports

    from ldm_dkdm.training.from_images import train_diffusion

    train_diffusion(run.config, run.folder, run.resumed)
    print(f"model: {run.folder.model}")


if __name__ == "__main__":
    run_cli(main)
