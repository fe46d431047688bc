"""Train a diffusion model on images (Alg. 2): python scripts/train_ldm.py --base configs/X.yaml"""

from ldm_dkdm.cli import load_arguments
from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse, train, say where the model lies."""
    from ldm_dkdm.schema import DiffusionRun

    config, name = load_arguments(__doc__, DiffusionRun)  # its mistakes before the slow imports

    from ldm_dkdm.runs.diffusion import train_diffusion

    folder = train_diffusion(config, name)
    print(f"model: {folder.model}")


if __name__ == "__main__":
    run_cli(main)
