"""Train a first stage on images: python scripts/train_first_stage.py --base configs/X.yaml [key=value ...]"""

from ldm_dkdm.cli import load_arguments
from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse, train, say where the autoencoder lies."""
    from ldm_dkdm.schema import FirstStageRun

    config, name = load_arguments(__doc__, FirstStageRun)  # its mistakes before the slow imports

    from ldm_dkdm.runs.first_stage import train_first_stage

    folder = train_first_stage(config, name)
    print(f"first stage: {folder.model}")


if __name__ == "__main__":
    run_cli(main)
