"""Figures of the teacher check for good and faulty teachers: python benchmarks/teacher_check.py [TEACHER ...]

Prints a markdown table; docs/teacher-check.md holds its output.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ldm_dkdm import DiffusionModel, UserError, load_model
from ldm_dkdm.evaluation.interpretations import reinterpreted
from ldm_dkdm.evaluation.teacher_check import COMPARED, measure


def faults(model: DiffusionModel) -> Iterator[tuple[str, DiffusionModel]]:
    """The model itself, then with each fault that occurs in practice, by name."""
    yield "good", model
    for name, change in (("random weights", _reset), ("shuffled weights", _shuffle), ("shuffled rows", _shuffle_rows)):
        yield name, _with_network(model, change)
    yield "output zero", _with_network(model, _zero)
    yield "NaN", _with_network(model, _nan)
    flipped = not model.node.params.get("use_new_attention_order", False)
    yield "other attention order", reinterpreted(model, use_new_attention_order=flipped)
    yield "one head", reinterpreted(model, num_head_channels=-1, num_heads=1)
    width = 32 if model.node.params.get("num_head_channels") == 16 else 16
    yield f"heads of {width} channels", reinterpreted(model, num_head_channels=width)
    own = model.diffusion
    for name, other in (
        ("linear schedule", replace(own, schedule="linear", beta_start=1e-4, beta_end=0.02)),
        ("LDM's schedule", replace(own, schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)),
        ("Stable Diffusion's schedule", replace(own, schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
        ("cosine schedule", replace(own, schedule="cosine")),
        ("half of T", replace(own, num_timesteps=own.num_timesteps // 2)),
    ):
        if other != own:
            yield name, model.changed(diffusion=other)
    wrong = "v" if model.parameterization == "eps" else "eps"
    yield f"{model.parameterization} interpreted as {wrong}", model.changed(parameterization=wrong)


def _with_network(model: DiffusionModel, change: Callable[[nn.Module], None]) -> DiffusionModel:
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        change(network)
    return model.changed(network=network)


def _reset(network: nn.Module) -> None:
    torch.manual_seed(0)
    for layer in network.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()


def _shuffle(network: nn.Module) -> None:
    for parameter in network.parameters():
        order = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


def _shuffle_rows(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter[torch.randperm(len(parameter), generator=torch.Generator().manual_seed(0))])


def _zero(network: nn.Module) -> None:
    network.out[2].weight.zero_()
    network.out[2].bias.zero_()


def _nan(network: nn.Module) -> None:
    network.out[2].bias[0] = torch.nan


def main() -> None:
    """Print the table of every teacher named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teachers", nargs="*", type=Path, default=[Path("models/teachers/emoji64")])
    for folder in parser.parse_args().teachers:
        print(
            f"\n| {folder} | cosine at T-1 | eps error at 0.75, 0.5, 0.25, 0.1 T | of linear | scale off by | verdict |"
        )
        print("|---|---|---|---|---|---|")
        for name, model in faults(load_model(folder)):
            figures = measure(model, images=COMPARED)
            try:
                model.changed(described=False).check()  # compares alternatives, as for a third-party checkpoint
                verdict = "passes"
            except UserError as error:
                verdict = str(error).removeprefix(f"{model.path}: ").partition(";")[0]
            errors = ", ".join(f"{row.eps_error:.3f}" for row in figures.rows[1:])
            shown = f"{figures.cosine:.3f} | {errors} | {figures.linear:.2f} | {figures.deviation:.3f}"
            print(f"| {name} | {shown} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
