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

    from ldm_dkdm.training.from_images import new_model, train

    config, out = call.config, call.folder.path
    go_on = f"continue with: dkdm train --resume {out}"
    with dotted_keys("trainer", "logging"):
        model = new_model(config)
        result = train(model, config.data, out, config=config, resume=call.resumed, signals=SIGNALS, go_on=go_on)
    print(f"model: {result.model.path}")
