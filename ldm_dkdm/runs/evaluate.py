"""Measuring a student against its teacher."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from ldm_dkdm.assemble import Model, load_first_stage, make_schedule
from ldm_dkdm.config import build
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluate.agreement import eps_error_by_quarter, held_out_chains
from ldm_dkdm.evaluate.frechet import pixel_frechet_distance
from ldm_dkdm.generate import SamplerConfig, sample_images
from ldm_dkdm.precision import resolve_precision
from ldm_dkdm.runs.loop import default_device
from ldm_dkdm.runs.plan import gflops, parameters
from ldm_dkdm.runs.sample import find_model
from ldm_dkdm.schema import FirstStageConfig
from ldm_dkdm.teacher import Teacher


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, object], Path]:
    """The figures of a student, and its folder."""
    device = default_device("auto")
    student, home = find_model(arguments.resume)
    teacher, _ = find_model(arguments.teacher)
    if student.latent_shape != teacher.latent_shape:
        raise UserError(f"{home}: states {student.latent_shape} differ from the teacher's {teacher.latent_shape}")
    as_teacher, as_student, untrained = (_denoiser(model, device) for model in (teacher, student, _untrained(student)))
    states = held_out_chains(as_teacher, teacher.latent_shape, arguments.chains, arguments.seed, device)
    steps = as_teacher.schedule.num_timesteps
    figures: dict[str, object] = {
        "eps_mse_by_t_quarter_untrained": _rounded(eps_error_by_quarter(untrained.predict, states, steps)),
        "eps_mse_by_t_quarter": _rounded(eps_error_by_quarter(as_student.predict, states, steps)),
    }
    for name, model in (("teacher", teacher), ("student", student)):
        figures[f"{name}_parameters"] = parameters(model.network)
        figures[f"{name}_gflops"] = round(gflops(model.network, model.latent_shape), 4)
    if arguments.n_samples:
        figures |= _distances(arguments, teacher, as_teacher, as_student, device)
    return figures, home


def _distances(
    arguments: argparse.Namespace, model: Model, teacher: Teacher, student: Teacher, device: torch.device
) -> dict[str, object]:
    codec, _ = load_first_stage(FirstStageConfig(), model, teacher.precision)
    codec.to(device)

    def paint(denoiser: Teacher, seed: int) -> tuple[Tensor, float]:
        config = SamplerConfig(arguments.n_samples, arguments.batch_size, seed, arguments.custom_steps)
        started = time.perf_counter()
        batches = list(sample_images(denoiser.predict, denoiser.schedule, model.latent_shape, codec, config, device))
        return torch.cat(batches), arguments.n_samples / (time.perf_counter() - started)

    reference, teacher_rate = paint(teacher, arguments.seed)
    again, _ = paint(teacher, 2 * arguments.seed + 1)
    students, student_rate = paint(student, 2 * arguments.seed + 1)
    return {
        "frechet_teacher_to_teacher": round(pixel_frechet_distance(reference, again), 3),
        "frechet_student_to_teacher": round(pixel_frechet_distance(reference, students), 3),
        "teacher_images_per_second": round(teacher_rate, 2),
        "student_images_per_second": round(student_rate, 2),
    }


def _denoiser(model: Model, device: torch.device) -> Teacher:
    precision = resolve_precision("auto", device)
    network, card = model.network, model.card
    return Teacher(network, make_schedule(card.diffusion), card.network.parameterization, precision).to(device)


def _untrained(model: Model) -> Model:
    torch.manual_seed(0)
    return Model(build(model.card.network, "network.params"), model.card, model.first_stage)


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]
