"""How far a student is from its teacher, in figures that are cheap enough to be measured during a training.

The teacher's part, a `Reference`, is computed once. Every measurement then calls the student alone.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_dkdm.checkpoints.hashes import check_content
from ldm_dkdm.checkpoints.reading import file_kind
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.diffusion.samplers import SAMPLERS, ImageNoise, last
from ldm_dkdm.errors import MALFORMED, UserError
from ldm_dkdm.evaluation.agreement import HeldOutStates, eps_error_by_quarter, eps_errors, held_out_chains
from ldm_dkdm.files import write_tensors
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.records import Prediction
from ldm_dkdm.rng import seed_of, torch_generator

CHAINS = 4  # held-out ancestral chains of the teacher
KEPT_STATES = 20  # timesteps of a chain at which the eps error is measured
IMAGES = 16  # images from the same noise
STEPS = 20  # DDIM steps of these images
BATCH = 16  # states in a call of the student, so that a measurement fits beside a training
LEAST_SIDE = 6  # pixels; SSIM's window of 11 mirrors 5 of them at each border
FIGURES = ("agreement", *(f"agreement_q{quarter}" for quarter in range(1, 5)), "x0_drift", "psnr", "ssim")


@dataclass(frozen=True)
class Reference:
    """What a student is compared with, on the CPU.

    Attributes:
        states: states of held-out exact chains with the teacher's eps there.
        drift: (K,B,C,H,W), the teacher's x_0 at every DDIM step, in the order of the chain.
        images: uint8 (B,H,W,C), what the chain ends at.
        label: (B,) classes of the images.
        seed: of the images; image i begins with the noise of seed + i.
    """

    states: HeldOutStates
    drift: Tensor
    images: Tensor
    label: Tensor | None
    seed: int


def teacher_calls(num_timesteps: int) -> int:
    """Single-sample calls of the teacher that a `Reference` takes, apart from DDIM's spacing."""
    return CHAINS * num_timesteps + IMAGES * min(STEPS, num_timesteps)


def new_reference(teacher: DiffusionModel, seed: int, done: Callable[[int], object] = lambda calls: None) -> Reference:
    """Walk the teacher's held-out chains, and sample its images.

    Args:
        teacher: on the device where it computes.
        seed: of a run; the noise differs from all that the run trains on.
        done: called with the number of finished steps of the chains.
    """
    own = seed_of(seed, 0, 0, "evaluation")
    every = max(1, teacher.schedule.num_timesteps // KEPT_STATES)
    states = held_out_chains(teacher, CHAINS, own, teacher.device, every, done)
    label = teacher.draw_labels(IMAGES, torch_generator(seed, 0, 1, "evaluation"))
    drift, images = _walked(teacher, own, label)
    labels = None if states.label is None else states.label.cpu()
    return Reference(HeldOutStates(states.x.cpu(), states.t.cpu(), states.eps.cpu(), labels), drift, images, label, own)


@torch.no_grad()
def agreement(student: DiffusionModel, reference: Reference) -> dict[str, float]:
    """Figures of a student against its teacher, by name; those that cannot be measured are left out.

    - agreement: squared eps error, mean over elements, held-out states and timesteps; 0 is the teacher.
      agreement_q1 ... q4: the same for t in the quarters of [0, T), ascending.
    - x0_drift: both models walk their own DDIM chain from the same noise; squared difference of the x_0 that they
      predict, mean over elements, images and steps. It also shows the errors that add up along a chain.
    - psnr (dB, at most 100) and ssim of the images at the ends of these chains, against the teacher's (Wang et al.
      2004, with a window of 11 pixels and mirrored borders; images with a side below 6 pixels have no SSIM).
    """
    device, total = student.device, student.schedule.num_timesteps

    def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        found = student.predict(x.to(device), t.to(device), None if label is None else label.to(device))
        return Prediction(found.eps.cpu(), found.x_0.cpu())

    errors = eps_errors(denoise, reference.states, BATCH)
    quarters = eps_error_by_quarter(errors, reference.states, total)
    drift, images = _walked(student, reference.seed, reference.label)
    figures = {"agreement": errors.mean().item()}
    figures |= {f"agreement_q{number}": error for number, error in enumerate(quarters, 1)}
    figures["x0_drift"] = (drift - reference.drift).square().mean().item()
    figures |= _likeness(images, reference.images)
    return {name: value for name, value in figures.items() if not math.isnan(value)}  # a T below 4 has empty quarters


def _walked(model: DiffusionModel, seed: int, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """A model's DDIM chain from the noise of a seed: x_0 at every step (K,B,C,H,W), images uint8 (B,H,W,C)."""
    kept: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        prediction = model.predict(x, t, label)
        kept.append(prediction.x_0.cpu())
        return prediction

    device, steps = model.device, min(STEPS, model.schedule.num_timesteps)
    noise = ImageNoise([seed + i for i in range(IMAGES)], model.shape, device)
    label = None if label is None else label.to(device)
    states = last(SAMPLERS["ddim"].walk(model.schedule, denoise, noise(), noise, steps, label))
    codec = model.codec().to(device, resolve_precision(model.precision, device))
    return torch.stack(kept), codec.decode(states).cpu().contiguous()


def _likeness(images: Tensor, teachers: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of images uint8 (B,H,W,C), by torchmetrics."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ours, theirs = (batch.movedim(-1, 1).float() / 255 for batch in (images, teachers))
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, dim=(1, 2, 3), reduction="none")
    figures = {"psnr": psnr.clamp(max=100.0).mean().item()}  # equal images have no bound
    if min(images.shape[1:3]) >= LEAST_SIDE:
        ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0)
        assert isinstance(ssim, Tensor)  # other options return a pair
        figures["ssim"] = ssim.item()
    return figures


def save_reference(reference: Reference, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a reference to a safetensors file, atomically, with what it follows from."""
    states = reference.states
    tensors = {"x": states.x, "t": states.t, "eps": states.eps, "drift": reference.drift, "images": reference.images}
    labels = {"states_label": states.label, "label": reference.label}
    tensors |= {name: label for name, label in labels.items() if label is not None}
    write_tensors(path, tensors, {"reference": json.dumps({"facts": facts, "seed": reference.seed})})


def read_reference(path: Path, facts: Mapping[str, Any]) -> Reference | None:
    """Read what `save_reference` wrote; None if there is none, or one that follows from other facts."""
    if not path.is_file():
        return None
    try:
        file_kind(path)  # refuses a header without end
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["reference"])
            if header["facts"] != json.loads(json.dumps(facts)):
                return None
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            check_content(path, found, file.metadata())
        states = HeldOutStates(found["x"], found["t"], found["eps"], found.get("states_label"))
        return Reference(states, found["drift"], found["images"], found.get("label"), header["seed"])
    except (SafetensorError, OSError, *MALFORMED, UserError):  # it is computed again
        return None


def reference_facts() -> dict[str, int]:
    """The sizes that a reference depends on."""
    return {"chains": CHAINS, "kept_states": KEPT_STATES, "images": IMAGES, "steps": STEPS}
