"""Measure a student against its teacher, without data."""

import time
from typing import Any

from torch import Tensor

from ldm_dkdm.checkpoints.contents import described, same_process
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.diffusion.samplers import SAMPLERS
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.agreement import eps_error_by_quarter, eps_error_by_t, eps_errors, held_out_chains
from ldm_dkdm.evaluation.frechet import pixel_frechet_distance
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.facts import whole
from ldm_dkdm.model.ranks import joined, sample_together
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
        UserError: models that `require_comparable` refuses, or a number out of range.
    """
    require_comparable(student, teacher)
    steps = min(20, teacher.schedule.num_timesteps) if steps is None else steps
    numbers = {"images": (images, 0), "steps": (steps, 1), "chains": (chains, 1), "seed": (seed, 0)}
    for name, (value, least) in {**numbers, "batch_size": (batch_size, 1)}.items():
        whole(value, name, least)
    if images and images < 65:
        raise UserError(f"images: at least 65, the distance uses 64 principal components; or 0; got {images}")
    total = teacher.schedule.num_timesteps
    if total < 4:
        raise UserError(f"teacher: it has T = {total}; the eps error is given by quarter of [0, T), which needs T >= 4")
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


def require_comparable(student: DiffusionModel, teacher: DiffusionModel) -> None:
    """Refuse a student that is not a model of the same process on the same states as the teacher.

    Raises:
        UserError: states of another shape or space, another noise schedule, or labels that are not the teacher's; names
            what differs.
    """
    if student.diffusion.space != teacher.diffusion.space:
        what, own, theirs = "space", student.diffusion.space, teacher.diffusion.space
    elif student.shape != teacher.shape:
        what, own, theirs = "shape", str(student.shape), str(teacher.shape)
    elif not same_process(student.schedule, teacher.schedule):
        what, own, theirs = "noise schedule", described(student.schedule), described(teacher.schedule)
    elif student.classes is not None and student.classes != teacher.classes:
        what, own, theirs = "labels", _labels(student), _labels(teacher)
    else:
        return
    raise UserError(f"{student.path or 'student'}: {what}: {own} differs from the teacher's {theirs}; not comparable")


def _labels(model: DiffusionModel) -> str:
    classes = model.classes
    if not classes:
        return "none"
    skipped = "" if len(classes) == classes[-1] + 1 else f" in 0 ... {classes[-1]}"
    return f"{len(classes)} classes{skipped}"


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
        if joined().ranks > 1:
            drawn = sample_together(model, SamplingConfig(images, batch_size, first, steps))
        else:
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
