"""Measure a student against its teacher, without data."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_dkdm import __version__
from ldm_dkdm.checkpoints.card import MEASURED_WITH
from ldm_dkdm.checkpoints.contents import described, same_process
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.diffusion.samplers import SAMPLERS
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.agreement import (
    KEPT_STATES,
    Reference,
    Sizes,
    compare,
    errors_of,
    teacher_calls,
)
from ldm_dkdm.evaluation.distances import distances
from ldm_dkdm.evaluation.gathering import require_cache, statistics_cache
from ldm_dkdm.evaluation.held_out import eps_error_by_quarter
from ldm_dkdm.evaluation.perceptual import Lpips, announced, find_lpips
from ldm_dkdm.evaluation.reference import cached_reference
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.arguments import path_of, require_model
from ldm_dkdm.model.facts import whole
from ldm_dkdm.model.ranks import joined
from ldm_dkdm.model.sampling import CheckedCalls
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.networks.cost import gflops
from ldm_dkdm.reporting import Progress, counted, logger

STEPS = 20  # DDIM steps of images, or all T where there are fewer
CHAINS, PAIRS = 32, 16  # default numbers of the teacher's chains, and of images from the same noise
RANDOM = "random weights"  # name of the untrained network in lines
LEAST = 65  # images; the distance uses 64 principal components


def evaluate(
    student: DiffusionModel,
    teacher: DiffusionModel,
    *,
    images: int = 1000,
    steps: int | None = None,
    chains: int = CHAINS,
    pairs: int = PAIRS,
    seed: int = 0,
    batch_size: int = 128,
    lpips: str | Path | Lpips | None = None,
    cache: str | Path | None = None,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Figures of a student against its teacher, by name.

    agreement, agreement_q1 ... q4, x0_drift, psnr, ssim, lpips: see `agreement.compare`, which also measures during a
    training. untrained_q1 ... q4: eps errors of the student's architecture with random weights. eps_mse_by_t: the
    student's at 20 timesteps (all, where T is smaller). frechet_*: see `distances`. Parameters, GFLOPs a call, images a
    second.

    Args:
        images: for the Frechet distance, 65 or more; 0 leaves it out.
        steps: DDIM steps of all images; default: 20, or all T where there are fewer.
        chains: held-out ancestral chains of the teacher, each of T calls.
        pairs: images that both models make from the same noise.
        seed: of chains and images, see `distances`. With the seed and the sizes of a training, the figures are the
            training's.
        batch_size: images drawn at once.
        lpips: file with torchvision's VGG16 weights, or `Lpips` that is found; default: the file in torch.hub's cache,
            without which LPIPS is left out, as a line of the log says.
        cache: folder of the images' statistics, and of the teacher's chains and pairs; default: `statistics_cache()`.

    Raises:
        UserError: models that `require_comparable` refuses, a number out of range, or a cache that cannot be written.
    """
    require_model(student, "student")
    require_model(teacher, "teacher")
    require_comparable(student, teacher)
    total = teacher.schedule.num_timesteps
    numbers = {"images": (images, 0), "steps": (steps_within(steps, teacher), 1), "chains": (chains, 1)}
    numbers |= {"seed": (seed, 0), "batch_size": (batch_size, 1), "pairs": (pairs, 1)}
    images, steps, chains, seed, batch_size, pairs = _whole_numbers(numbers)
    sizes = Sizes(chains, pairs, steps)
    SAMPLERS["ddim"].timesteps(teacher.schedule, sizes.steps)  # refuses what does not fit
    for model in (student, teacher):
        model.codec()  # refuses a missing first stage before the chains are walked
    folder = path_of(statistics_cache() if cache is None else cache, "cache")
    if images:
        require_cache(folder)
    logger.info(work(sizes, images, total))
    figures: dict[str, Any] = {MEASURED_WITH: measured_with(sizes, images, seed)}
    figures |= joined().on_first(lambda: _agreement(student, teacher, sizes, seed, batch_size, lpips, folder, progress))
    if images:
        config = SamplingConfig(images, batch_size, seed, sizes.steps)
        figures |= distances(student, teacher, config, folder, progress)
    return figures


def _agreement(
    student: DiffusionModel,
    teacher: DiffusionModel,
    sizes: Sizes,
    seed: int,
    batch_size: int,
    lpips: str | Path | Lpips | None,
    cache: Path,
    progress: bool | Progress,
) -> dict[str, Any]:
    """The figures that need no set of images."""
    perceptual = lpips if isinstance(lpips, Lpips) else announced(find_lpips(lpips))
    reference = cached_reference(teacher, seed, sizes, cache, batch_size, progress)
    found = compare(student, reference, perceptual, batch_size=batch_size, progress=progress)
    figures: dict[str, Any] = found.figures | _untrained_errors(student, reference, batch_size, progress)
    figures["eps_mse_by_t"] = {str(t): round(e, 6) for t, e in found.by_t.items()}
    for name, model in (("teacher", teacher), ("student", student)):
        figures[f"{name}_parameters"] = model.parameters
        cost = gflops(model.network, model.shape, model.num_classes is not None)
        figures[f"{name}_gflops"] = round(cost, 4)
    return figures


def steps_within(steps: int | None, teacher: DiffusionModel) -> int:
    """DDIM steps of images; default: 20, or all T where there are fewer."""
    return min(STEPS, teacher.schedule.num_timesteps) if steps is None else steps


def _whole_numbers(numbers: Mapping[str, tuple[int, int]]) -> list[int]:
    """Numbers, each given with the least that it may be, as Python's integers; no or enough images."""
    found = {name: int(whole(value, name, least) or 0) for name, (value, least) in numbers.items()}
    if found["images"] and found["images"] < LEAST:
        few = f"at least {LEAST}, the distance uses 64 principal components; or 0; got {found['images']}"
        raise UserError(f"images: {few}")
    return list(found.values())


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


def work(sizes: Sizes, images: int, num_timesteps: int) -> str:
    """What `evaluate` will do: images, and calls of both networks counted by samples."""
    sampled = sizes.steps * images
    teacher = teacher_calls(num_timesteps, sizes) + 2 * sampled
    states = sizes.chains * min(KEPT_STATES, num_timesteps)
    student = 2 * states + sizes.images * sizes.steps + sampled
    drawn = f"{3 * images + 2 * sizes.images:,} images by DDIM in {counted(sizes.steps, 'step')}"
    return (
        f"to do: {counted(sizes.chains, 'chain')} of the teacher through {num_timesteps:,} steps, {drawn}; "
        f"calls of one sample: teacher {teacher:,}, student about {student:,}"
    )


def measured_with(sizes: Sizes, images: int, seed: int) -> str:
    """The package, its version, and the options that the figures depend on, as the command takes them."""
    options = f"-n {images} -c {sizes.steps} --chains {sizes.chains} --pairs {sizes.images} --seed {seed}"
    return f"ldm_dkdm {__version__}: dkdm evaluate {options}"


def _untrained_errors(
    model: DiffusionModel, reference: Reference, batch_size: int, progress: bool | Progress
) -> dict[str, float]:
    """Eps errors of the architecture with random weights.

    There are none of a user's own module, which cannot be rebuilt, and of predictions that are not finite.
    """
    if model.node.target not in NETWORKS:
        return {}
    untrained = model.student(model.node).to(model.device, model.precision)
    calls = CheckedCalls(untrained, RANDOM)
    errors = errors_of(calls, reference.states, batch_size, progress, RANDOM)
    if not errors.isfinite().all():
        logger.info(f"no untrained_q1 ... untrained_q4: predictions of {RANDOM} are not finite")
        return {}
    quarters = eps_error_by_quarter(errors, reference.states, model.schedule.num_timesteps)
    return {f"untrained_q{n}": error for n, error in enumerate(quarters, 1) if not math.isnan(error)}
