"""Measure a student against its teacher, without data."""

import time
from typing import Any

from torch import Tensor

from ldm_dkdm.diffusion.samplers import SAMPLERS
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.agreement import eps_error_by_quarter, eps_error_by_t, eps_errors, held_out_chains
from ldm_dkdm.evaluation.frechet import pixel_frechet_distance
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.networks.cost import gflops
from ldm_dkdm.reporting import Progress


def evaluate(
    student: DiffusionModel,
    teacher: DiffusionModel,
    *,
    images: int = 1000,
    steps: int | None = None,
    chains: int = 32,
    seed: int = 1_000_000,
    batch_size: int = 128,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Figures of a student against its teacher, by name.

    eps_mse_by_t: mean squared error of eps on states of exact teacher chains that were not trained on, at every 25th t
    (more where T < 100) and by quarter of t, ascending; the same for the student's architecture with random weights.
    frechet_*: distance of images on 64 principal components of pixels. Parameters, GFLOPs a call, images a second.

    Args:
        images: for the Frechet distance, 65 or more; 0 leaves it out.
        steps: DDIM steps of the images; default: 20, or all T where there are fewer.
        chains: held-out ancestral chains of the teacher, each of T calls.
        seed: of chains and images.
        batch_size: images drawn at once.

    Raises:
        UserError: states of different shapes, or a number out of range.
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"{student.path or 'student'}: states {student.shape} differ from the teacher's {teacher.shape}"
        )
    if images and images < 65:
        raise UserError(f"images: at least 65, the distance uses 64 principal components; or 0; got {images}")
    if chains < 1:
        raise UserError(f"chains: must be at least 1, got {chains}")
    total = teacher.schedule.num_timesteps
    if total < 4:
        raise UserError(f"teacher: it has T = {total}; the eps error is given by quarter of [0, T), which needs T >= 4")
    steps = min(20, total) if steps is None else steps
    SAMPLERS["ddim"].timesteps(teacher.schedule, steps)  # refuses what does not fit
    states = held_out_chains(teacher, chains, seed, teacher.device)
    figures: dict[str, Any] = {"measured_with": measured_with(images, steps, chains, seed)}
    untrained = _untrained(student)
    if untrained is not None:
        first = eps_errors(untrained.predict, states)
        figures["eps_mse_by_t_quarter_untrained"] = _rounded(eps_error_by_quarter(first, states, total))
    errors = eps_errors(student.predict, states)
    figures["eps_mse_by_t_quarter"] = _rounded(eps_error_by_quarter(errors, states, total))
    figures["eps_mse_by_t"] = {str(t): round(e, 6) for t, e in eps_error_by_t(errors, states).items()}
    for name, model in (("teacher", teacher), ("student", student)):
        figures[f"{name}_parameters"] = model.parameters
        cost = gflops(model.network, model.shape, model.num_classes is not None)
        figures[f"{name}_gflops"] = round(cost, 4)
    if images:
        figures |= _distances(student, teacher, images, steps, seed, batch_size, progress)
    return figures


def measured_with(images: int, steps: int, chains: int, seed: int) -> str:
    """The options that the figures depend on, as the command takes them."""
    samples = f"-n {images} -c {steps} " if images else "-n 0 "
    return f"evaluate.py {samples}--chains {chains} --seed {seed}"


def _distances(
    student: DiffusionModel,
    teacher: DiffusionModel,
    images: int,
    steps: int,
    seed: int,
    batch_size: int,
    progress: bool | Progress,
) -> dict[str, float]:
    def draw(model: DiffusionModel, first: int) -> tuple[Tensor, float]:
        started = time.perf_counter()
        drawn = model.sample(images, steps=steps, seed=first, batch_size=batch_size, progress=progress)
        return drawn, images / (time.perf_counter() - started)

    reference, teacher_rate = draw(teacher, seed)
    again, _ = draw(teacher, seed + images)
    students, student_rate = draw(student, seed + images)
    return {
        "frechet_teacher_to_teacher": round(pixel_frechet_distance(reference, again), 3),
        "frechet_student_to_teacher": round(pixel_frechet_distance(reference, students), 3),
        "teacher_images_per_second": round(teacher_rate, 2),
        "student_images_per_second": round(student_rate, 2),
    }


def _untrained(model: DiffusionModel) -> DiffusionModel | None:
    """The same architecture with random weights; None for a module of the user's own, which cannot be rebuilt."""
    if model.node.target not in NETWORKS:
        return None
    return model.student(model.node).to(model.device, model.precision)


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]
