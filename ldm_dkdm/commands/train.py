"""Train a diffusion model on images (Alg. 2): dkdm train --base FILE_OR_RECIPE [key=value ...]"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm_dkdm.commands.arguments import (
    SIGNALS,
    TrainingCall,
    add_first_stage_argument,
    add_plan_argument,
    add_training_arguments,
    dotted_keys,
    how_to_go_on,
    load_plugins,
    print_keys,
    print_plan,
    read_training_call,
    split_base,
)
from ldm_dkdm.commands.world import add_world_arguments
from ldm_dkdm.config.checked import hints_of
from ldm_dkdm.config.load import read_overrides
from ldm_dkdm.config.schema import DiffusionRun
from ldm_dkdm.device import is_first_rank

if TYPE_CHECKING:
    from ldm_dkdm.model import DiffusionModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of all trainings, `--plan`, `--nodes` and `--devices`."""
    add_training_arguments(parser)
    add_world_arguments(parser)
    add_plan_argument(parser)
    add_first_stage_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Train, then print the model folder."""
    if print_keys(options, DiffusionRun):
        return
    call = read_training_call(options, DiffusionRun)  # reports mistakes before the slow imports
    if _gives_mix(split_base(options.base, options.overrides)[1]):
        call.config.data.require_mixture()
    load_plugins(options.plugin)
    config, out = call.config, call.folder.path
    if options.plan:
        if is_first_rank():  # the others of a launcher have nothing to plan
            with dotted_keys("data", "trainer", "logging"):
                _plan(call)
        return

    from ldm_dkdm.training.from_images import new_model, train

    go_on = how_to_go_on("train", out)
    with dotted_keys("trainer", "logging"):
        model = new_model(_located(call), out)
        _require_effect(call, model)
        result = train(model, config.data, out, config=config, resume=call.resumed, signals=SIGNALS, go_on=go_on)
    if is_first_rank():
        print(f"model: {result.model.path}")


def _gives_mix(overrides: Sequence[str]) -> bool:
    """Whether the command line sets `data.mix`; that of a recipe waits for the second set."""
    written = [item for item in overrides if item.partition("=")[0] in ("data", "data.mix")]
    given = read_overrides(written, hints_of(DiffusionRun)).get("data") if written else None
    return isinstance(given, Mapping) and "mix" in given


def _located(call: TrainingCall[DiffusionRun]) -> DiffusionRun:
    """The config with the paths of a resumed run where they are now, without initial weights that it has no use for."""
    from ldm_dkdm.training.finding import located_paths, network_to_train

    config, run = call.config, call.begun
    model = network_to_train(config.model, call.folder, run)
    return replace(config, model=model, data=located_paths(config.data, run))


def _require_effect(call: TrainingCall[DiffusionRun], model: "DiffusionModel") -> None:
    """Refuse a variance that the network to train replaces by its own; the run of an older version goes on with it."""
    from ldm_dkdm.distillation.make_student import require_fixed_variance
    from ldm_dkdm.model.opening import learns_variance

    if learns_variance(model.network) and not (call.folder.path / "config.yaml").is_file():
        require_fixed_variance(call.config.diffusion)


def _plan(call: TrainingCall[DiffusionRun]) -> None:
    from ldm_dkdm.device import default_device, resolve_precision
    from ldm_dkdm.training.from_images import new_model
    from ldm_dkdm.training.image_plan import plan_training, training_costs, training_time

    config = _located(call)
    model = new_model(config, call.folder.path)
    _require_effect(call, model)
    model.precision = resolve_precision(config.trainer.precision, default_device(config.trainer.accelerator))
    parts = plan_training(model, config, call.resumed)
    print_plan(training_costs(parts), lambda: training_time(parts))
