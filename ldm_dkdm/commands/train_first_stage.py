"""Train a first stage on images: dkdm train-first-stage --base FILE_OR_RECIPE [key=value ...]"""

import argparse

from ldm_dkdm.commands.arguments import (
    SIGNALS,
    add_training_arguments,
    dotted_keys,
    how_to_go_on,
    print_keys,
    read_training_call,
)
from ldm_dkdm.config.schema import FirstStageRun

add_arguments = add_training_arguments


def run(options: argparse.Namespace) -> None:
    """Train, then print the first-stage folder."""
    if print_keys(options, FirstStageRun):
        return
    call = read_training_call(options, FirstStageRun)  # reports mistakes before the slow imports

    from ldm_dkdm.training.autoencoder import train_first_stage

    go_on = how_to_go_on("train-first-stage", call.folder.path)
    with dotted_keys("trainer", "logging"):
        train_first_stage(call.config, call.folder.path, resume=call.resumed, signals=SIGNALS, go_on=go_on)
    print(f"first stage: {call.folder.model}")
