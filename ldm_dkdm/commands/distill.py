"""Distil a diffusion model without data: dkdm distill --base FILE_OR_RECIPE [key=value ...]"""

import argparse
from dataclasses import replace
from pathlib import Path
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
)
from ldm_dkdm.commands.world import add_world_arguments
from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.device import is_first_rank

if TYPE_CHECKING:
    from ldm_dkdm.model import DiffusionModel


UNCOMPILED = "not timed: the run compiles both networks, the times above are of networks that are not compiled"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of all trainings, `--plan`, `--nodes` and `--devices`."""
    add_training_arguments(parser)
    add_world_arguments(parser)
    add_plan_argument(parser)
    add_first_stage_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Plan, or distil and print the student's folder."""
    if print_keys(options, DistillRun):
        return
    call = read_training_call(options, DistillRun)  # reports mistakes before the slow imports
    load_plugins(options.plugin)
    with dotted_keys("distill", "trainer", "logging"):
        if not options.plan:
            _distil(call)
        elif is_first_rank():  # the others of a launcher have nothing to plan
            _plan(call)


def _distil(call: TrainingCall[DistillRun]) -> None:
    from ldm_dkdm.device import default_device, resolve_precision
    from ldm_dkdm.distillation.make_student import make_student
    from ldm_dkdm.networks.modes import stored_in_bf16
    from ldm_dkdm.training.finding import network_to_train

    config, out = call.config, call.folder.path
    teacher = open_teacher(config, out)
    student = make_student(network_to_train(config.student, call.folder, call.begun), teacher, config.trainer.seed)

    from ldm_dkdm.training.from_teacher import distill  # imports Lightning, after mistakes in the models are known

    if resolve_precision(config.trainer.precision, default_device(config.trainer.accelerator)) == "bf16":
        teacher.network = stored_in_bf16(teacher.network)  # the only copy, in half the memory
    go_on = how_to_go_on("distill", out)
    result = distill(teacher, student, out, config=config, resume=call.resumed, signals=SIGNALS, go_on=go_on)
    if is_first_rank():
        print(f"student: {result.model.path}")


def open_teacher(config: DistillRun, run: Path | None = None) -> "DiffusionModel":
    """The teacher that a config names, with its guidance; a relative path is looked for around the run folder first."""
    from ldm_dkdm.checkpoints import Hints
    from ldm_dkdm.model import open_model
    from ldm_dkdm.training.finding import located, located_paths

    stage = located_paths(config.first_stage, run)
    hints = Hints.of_sections(config.teacher, config.diffusion, stage, config.trainer.verify)
    with dotted_keys("teacher", path="teacher.ckpt"):
        return open_model(located(config.teacher.ckpt, run) if run else config.teacher.ckpt, hints).changed(
            guidance=config.teacher.guidance
        )


def _plan(call: TrainingCall[DistillRun]) -> None:
    from ldm_dkdm.checkpoints.releases import how_to_get
    from ldm_dkdm.config.recipes import find_shipped
    from ldm_dkdm.device import compiles, default_device, resolve_precision
    from ldm_dkdm.distillation.make_student import make_student
    from ldm_dkdm.networks.modes import stored_in_bf16
    from ldm_dkdm.training.finding import network_to_train
    from ldm_dkdm.training.parts import assemble
    from ldm_dkdm.training.plan import costs, time_needed
    from ldm_dkdm.training.pool_filling import going_on
    from ldm_dkdm.training.resuming import Begun

    config = call.config
    begun = Begun.of(call.folder.checkpoints, config.trainer) if call.resumed else Begun()
    if end := begun.end(config.trainer.max_steps):
        print(f"{call.folder.path}: at step {begun.step:,} already; a larger {end} continues it")
        return
    path = find_shipped(config.teacher.ckpt)
    missing = not path.exists() and config.teacher.target is not None and config.diffusion is not None
    if missing:
        print(f"{path} is missing: planned with random weights; {how_to_get(path)}")
    teacher = untrained_teacher(config, path) if missing else open_teacher(config, call.folder.path)
    device = default_device(config.trainer.accelerator)
    teacher.precision = resolve_precision(config.trainer.precision, device)
    student = make_student(network_to_train(config.student, call.folder, call.begun), teacher, config.trainer.seed)
    parts = assemble(teacher, student, config, call.resumed)
    if call.resumed:
        parts = going_on(parts, call.folder.checkpoints, begun.latest)
    parts = replace(parts, done=begun.step, spent=begun.spent)
    planned = costs(parts)
    if teacher.precision == "bf16":
        teacher.network = stored_in_bf16(teacher.network)  # as in the run, which is timed
    uncompiled = {"compiling": UNCOMPILED} if compiles(config.trainer.compile, device) else {}
    print_plan(planned, lambda: {**time_needed(parts), **uncompiled})


def untrained_teacher(config: DistillRun, path: Path) -> "DiffusionModel":
    """A teacher of the configured architecture with random weights, for a plan without its checkpoint."""
    from ldm_dkdm.checkpoints.contents import schedule_of
    from ldm_dkdm.checkpoints.first_stages import FirstStageSource
    from ldm_dkdm.config.registry import build
    from ldm_dkdm.config.schema import NetworkConfig
    from ldm_dkdm.model import DiffusionModel
    from ldm_dkdm.model.opening import refuse_in_pixel_space
    from ldm_dkdm.networks import NETWORKS

    assert config.teacher.target is not None and config.diffusion is not None  # checked by `_plan`
    refuse_in_pixel_space(config.first_stage, config.diffusion)
    node = NetworkConfig(config.teacher.target, config.teacher.params, config.teacher.parameterization or "eps")
    return DiffusionModel(
        build(node, NETWORKS, "teacher.params"),
        schedule=schedule_of(config.diffusion),
        parameterization=node.parameterization,
        space=config.diffusion.space,
        first_stage=FirstStageSource(path).changed(config.first_stage),
        node=node,
        null_label=config.teacher.null_label,
        guidance=config.teacher.guidance,
    )
