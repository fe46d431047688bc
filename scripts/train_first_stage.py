"""Train a first stage on images: python scripts/train_first_stage.py --base configs/X.yaml [key=value ...]"""

from ldm_dkdm.errors import run_cli


def main() -> None:
    """Parse, train, say where the autoencoder lies."""
    from ldm_dkdm.commands.arguments import read_arguments, training_parser
    from ldm_dkdm.config.schema import FirstStageRun

    run = read_arguments(training_parser(__doc__), FirstStageRun)  # its mistakes before the slow imports

    from ldm_dkdm.training.first_stages import train_first_stage

    train_first_stage(run.config, run.folder, run.resumed)
    print(f"first stage: {run.folder.model}")


if __name__ == "__main__":
    run_cli(main)
