"""Train a diffusion model on images (Alg. 2): dkdm train --base FILE_OR_RECIPE [key=value ...]"""

import argparse

from ldm_dkdm.commands.arguments import (
    SIGNALS,
    add_training_arguments,
    dotted_keys,
    load_plugins,
    print_keys,
    read_training_call,
)
from ldm_dkdm.config.schema import DiffusionRun

add_arguments = add_training_arguments


def run(options: argparse.Namespace) -> None:
    """Train, then print the model folder."""
    if print_keys(options, DiffusionRun):
        return
    call = read_training_call(options, DiffusionRun)  # reports mistakes before the slow imports
    load_plugins(options.plugin)

    from ldm_dkdm.training.from_images import new_model, train_in
    from ldm_dkdm.training.run import Run

    go_on = f"continue with: dkdm train --resume {call.folder.path}"
    with dotted_keys("trainer", "logging"):
        run = Run(call.config, call.folder, call.resumed, signals=SIGNALS, go_on=go_on)
        train_in(run, new_model(call.config))
    print(f"model: {call.folder.model}")
