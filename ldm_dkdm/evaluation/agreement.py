"""How far a student is from its teacher, without data: the only computation of it, during and after a training.

The teacher's part, a `Reference`, is computed once. Every measurement then calls the student alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.device import resolve_precision
from ldm_dkdm.diffusion.samplers import SAMPLERS, ImageNoise, last
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.held_out import (
    HeldOutStates,
    eps_error_by_quarter,
    eps_error_by_t,
    eps_errors,
    held_out_chains,
)
from ldm_dkdm.evaluation.likeness import likeness
from ldm_dkdm.evaluation.perceptual import Lpips
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.sampling import OVERFLOW, CheckedCalls
from ldm_dkdm.records import Prediction
from ldm_dkdm.reporting import Progress, counted, following
from ldm_dkdm.rng import seed_of, torch_generator

KEPT_STATES = 20  # timesteps of a chain at which the eps error is measured
BATCH = 16  # states in a call of the student, so that a measurement fits beside a training
STUDENT, TEACHER = "the student", "the teacher"  # without a path
FIGURES = ("agreement", *(f"agreement_q{quarter}" for quarter in range(1, 5)), "x0_drift", "psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Sizes:
    """How much is compared.

    Attributes:
        chains: held-out ancestral chains of the teacher.
        images: images that both models sample from the same noise.
        steps: their DDIM steps; all T where there are fewer.
    """

    chains: int
    images: int
    steps: int

    def __str__(self) -> str:
        images = f"{counted(self.images, 'image')} from the same noise by DDIM in {counted(self.steps, 'step')}"
        return f"{counted(self.chains, 'chain')} of the teacher, {images}"


TRAINING = Sizes(chains=4, images=16, steps=20)  # what a training measures


@dataclass(frozen=True)
class Reference:
    """What a student is compared with, on the CPU.

    Attributes:
        states: states of held-out exact chains with the teacher's eps there.
        drift: (K,B,C,H,W), the teacher's x_0 at every DDIM step, in the order of the chain.
        images: uint8 (B,H,W,C), what the chain ends at.
        label: (B,) classes of the images.
        seed: of the images; image i begins with the noise of seed + i.
        steps: DDIM steps that were asked for; its spacing may make more.
    """

    states: HeldOutStates
    drift: Tensor
    images: Tensor
    label: Tensor | None
    seed: int
    steps: int


@dataclass(frozen=True)
class Comparison:
    """Figures of a student against its teacher by name, and its squared eps error by timestep."""

    figures: dict[str, float]
    by_t: dict[int, float]


def teacher_calls(num_timesteps: int, sizes: Sizes | None = None) -> int:
    """Single-sample calls of the teacher that a `Reference` takes, apart from DDIM's spacing."""
    sizes = sizes or TRAINING
    return sizes.chains * num_timesteps + sizes.images * min(sizes.steps, num_timesteps)


def new_reference(
    teacher: DiffusionModel,
    seed: int,
    sizes: Sizes | None = None,
    *,
    batch_size: int = BATCH,
    progress: bool | Progress = False,
    check: Callable[[], object] = lambda: None,
) -> Reference:
    """Walk the teacher's held-out chains, and sample its images.

    Args:
        teacher: on the device where it computes.
        seed: of a run; the noise differs from all that the run trains on.
        sizes: default: TRAINING. batch_size: images at once.
        progress: a bar, or a function. check: called after every step of the chains; what it raises ends the work.

    Raises:
        UserError: a teacher whose chains or predictions are not finite.
    """
    own, sizes = seed_of(seed, 0, 0, "evaluation"), sizes or TRAINING
    total = teacher.schedule.num_timesteps
    with following(progress, "held-out chains", "step", total, of=counted(sizes.chains, "chain")) as show:

        def done(calls: int) -> None:
            show(calls)
            check()

        states = held_out_chains(teacher, sizes.chains, own, teacher.device, KEPT_STATES, done)
    if not (is_finite := states.is_finite()).all():
        where = f"(t = {int(states.t[~is_finite].max())})"
        raise UserError(f"{_name(teacher, TEACHER)}: its held-out chains are not finite {where}; {OVERFLOW}")
    label = teacher.draw_labels(sizes.images, torch_generator(seed, 0, 1, "evaluation"))
    drift, images = _walked(teacher, own, label, sizes.images, sizes.steps, batch_size, progress, TEACHER)
    labels = None if states.label is None else states.label.cpu()
    states = HeldOutStates(states.x.cpu(), states.t.cpu(), states.eps.cpu(), labels)
    return Reference(states, drift, images, label, own, sizes.steps)


def agreement(student: DiffusionModel, reference: Reference, lpips: Lpips | None = None) -> dict[str, float]:
    """The figures of `compare`."""
    return compare(student, reference, lpips).figures


@torch.no_grad()
def compare(
    student: DiffusionModel,
    reference: Reference,
    lpips: Lpips | None = None,
    *,
    batch_size: int = BATCH,
    progress: bool | Progress = False,
) -> Comparison:
    """Figures of a student against its teacher; those of quarters without states are left out.

    - agreement: squared eps error, mean over elements, held-out states and timesteps; 0 is the teacher.
      agreement_q1 ... q4: the same for t in the quarters of [0, T), ascending.
    - x0_drift: both models walk their own DDIM chain from the same noise; squared difference of the x_0 that they
      predict, mean over elements, images and steps. It also shows the errors that add up along a chain.
    - psnr, ssim and lpips (`likeness`) of the images at the ends of these chains, against the teacher's.

    Raises:
        UserError: predictions, or their squared errors, that are not finite.
    """
    states, total = reference.states, student.schedule.num_timesteps
    calls = CheckedCalls(student, _name(student, STUDENT))
    errors = errors_of(calls, states, batch_size, progress, STUDENT)
    calls.require_finite()
    count, label = len(reference.images), reference.label
    drift, images = _walked(student, reference.seed, label, count, reference.steps, batch_size, progress, STUDENT)
    figures = {"agreement": errors.mean().item()}
    figures |= {f"agreement_q{n}": error for n, error in enumerate(eps_error_by_quarter(errors, states, total), 1)}
    figures["x0_drift"] = (drift - reference.drift).square().mean().item()
    if not (math.isfinite(figures["agreement"]) and math.isfinite(figures["x0_drift"])):
        raise UserError(f"{_name(student, STUDENT)}: the squares of its errors overflow; {OVERFLOW}")
    pairs = likeness(images, reference.images, None if lpips is None else lpips.metric)
    figures |= {name: values.mean().item() for name, values in pairs.items()}
    known = {name: value for name, value in figures.items() if not math.isnan(value)}  # quarters without states
    return Comparison(known, eps_error_by_t(errors, states))


def errors_of(
    calls: CheckedCalls, states: HeldOutStates, batch_size: int, progress: bool | Progress, whose: str
) -> Tensor:
    """Squared eps errors (N,) of a model's calls on states on the CPU; a bar says whose."""
    device = calls.model.device

    def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        found = calls(x.to(device), t.to(device), None if label is None else label.to(device))
        return Prediction(found.eps.cpu(), found.x_0.cpu())

    with following(progress, f"eps errors of {whose}", "state", len(states.t)) as show:
        return eps_errors(denoise, states, batch_size, show)


def _name(model: DiffusionModel, whose: str) -> str:
    """What messages call a model."""
    return str(model.path or whose)


def _walked(
    model: DiffusionModel,
    seed: int,
    label: Tensor | None,
    count: int,
    steps: int,
    batch_size: int,
    progress: bool | Progress,
    whose: str,
) -> tuple[Tensor, Tensor]:
    """DDIM chains of a model from the noise of a seed: x_0 at every step (K,B,C,H,W), images uint8 (B,H,W,C)."""
    drifts, images = [], []
    with following(progress, "images from the same noise", "image", count, of=whose) as show:
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            own = None if label is None else label[start : numbers.stop].to(model.device)
            calls = CheckedCalls(model, _name(model, whose))
            *drift, states = _chain(calls, [seed + i for i in numbers], own, min(steps, model.schedule.num_timesteps))
            codec = model.codec().to(model.device, resolve_precision(model.precision, model.device))
            drifts.append(torch.stack(drift))
            images.append(codec.decode(states).cpu().contiguous())
            show(numbers.stop)
    return torch.cat(drifts, 1), torch.cat(images)


def _chain(calls: CheckedCalls, seeds: list[int], label: Tensor | None, steps: int) -> Iterator[Tensor]:
    """The x_0 (B,C,H,W) that a model predicts at every DDIM step, and then the chain's end."""
    model, kept = calls.model, list[Tensor]()

    def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        prediction = calls(x, t, label)
        kept.append(prediction.x_0.cpu())
        return prediction

    noise = ImageNoise(seeds, model.shape, model.device)
    states = last(SAMPLERS["ddim"].walk(model.schedule, denoise, noise(), noise, steps, label))
    calls.require_finite(states)
    yield from (*kept, states)
