"""Measuring a student against its teacher."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from ldm_dkdm.assemble import find_model, load_first_stage
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import FirstStageConfig, TeacherConfig
from ldm_dkdm.device import default_device, resolve_precision
from ldm_dkdm.diffusion.samplers import ddim_timesteps
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.agreement import eps_error_by_quarter, eps_error_by_t, eps_errors, held_out_chains
from ldm_dkdm.evaluation.frechet import pixel_frechet_distance
from ldm_dkdm.generate import SamplerConfig, sample_images
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.networks.cost import gflops, parameters
from ldm_dkdm.sources import Model, load_teacher
from ldm_dkdm.teacher import Teacher


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, object], Path]:
    """The figures of a student, and its folder."""
    device = default_device("auto")
    student, home = find_model(arguments.resume)
    teacher, guidance = find_teacher(arguments.resume, arguments.teacher)
    if student.latent_shape != teacher.latent_shape:
        raise UserError(f"{home}: states {student.latent_shape} differ from the teacher's {teacher.latent_shape}")
    as_teacher = _denoiser(teacher, device, guidance.guidance, guidance.null_label)
    as_student, untrained = (_denoiser(model, device) for model in (student, _untrained(student)))
    ddim_timesteps(as_teacher.schedule.num_timesteps, arguments.custom_steps)  # refuses what does not fit
    states = held_out_chains(as_teacher, teacher.latent_shape, arguments.chains, arguments.seed, device)
    steps = as_teacher.schedule.num_timesteps
    errors, first_errors = (eps_errors(model.predict, states) for model in (as_student, untrained))
    figures: dict[str, object] = {
        "measured_with": measured_with(arguments),
        "eps_mse_by_t_quarter_untrained": _rounded(eps_error_by_quarter(first_errors, states, steps)),
        "eps_mse_by_t_quarter": _rounded(eps_error_by_quarter(errors, states, steps)),
    }
    figures["eps_mse_by_t"] = {str(t): round(e, 6) for t, e in eps_error_by_t(errors, states).items()}
    for name, model in (("teacher", teacher), ("student", student)):
        figures[f"{name}_parameters"] = parameters(model.network)
        figures[f"{name}_gflops"] = round(gflops(model.network, model.latent_shape), 4)
    if arguments.n_samples:
        figures |= _distances(arguments, student, as_teacher, as_student, device)
    return figures, home


def measured_with(arguments: argparse.Namespace) -> str:
    """The options that the figures depend on."""
    pictures = f"-n {arguments.n_samples} -c {arguments.custom_steps} " if arguments.n_samples else "-n 0 "
    return f"evaluate.py {pictures}--chains {arguments.chains} --seed {arguments.seed}"


def find_teacher(student: Path, teacher: Path | None) -> tuple[Model, TeacherConfig]:
    """The teacher at a path, or the one that the student's run was distilled from, and how the run used it."""
    config = student / "config.yaml"
    run = load_config(config) if (student / "student").is_dir() and config.is_file() else None
    if teacher is not None:
        return find_model(teacher)[0], run.teacher if run else TeacherConfig(str(teacher))
    if run is None:
        raise UserError(f"--teacher: {student} is no run folder, so the teacher must be named")
    return load_teacher(run), run.teacher


def _distances(
    arguments: argparse.Namespace, model: Model, teacher: Teacher, student: Teacher, device: torch.device
) -> dict[str, object]:
    codec, _ = load_first_stage(FirstStageConfig(), model, teacher.precision)
    codec.to(device)

    def paint(denoiser: Teacher, seed: int) -> tuple[Tensor, float]:
        config = SamplerConfig(arguments.n_samples, arguments.batch_size, seed, arguments.custom_steps)
        started = time.perf_counter()
        schedule, shape = denoiser.schedule, model.latent_shape
        batches = list(sample_images(denoiser.predict, schedule, shape, codec, config, device, denoiser.classes))
        return torch.cat(batches), arguments.n_samples / (time.perf_counter() - started)

    reference, teacher_rate = paint(teacher, arguments.seed)
    fresh = arguments.seed + arguments.n_samples
    again, _ = paint(teacher, fresh)
    students, student_rate = paint(student, fresh)
    return {
        "frechet_teacher_to_teacher": round(pixel_frechet_distance(reference, again), 3),
        "frechet_student_to_teacher": round(pixel_frechet_distance(reference, students), 3),
        "teacher_images_per_second": round(teacher_rate, 2),
        "student_images_per_second": round(student_rate, 2),
    }


def _denoiser(model: Model, device: torch.device, guidance: float = 1.0, null_label: int | None = None) -> Teacher:
    return model.as_teacher(resolve_precision("auto", device), guidance, null_label).to(device)


def _untrained(model: Model) -> Model:
    torch.manual_seed(0)
    return Model(build(model.card.network, NETWORKS, "network.params"), model.card, model.first_stage)


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]
