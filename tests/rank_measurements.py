"""What each process of tests/test_rank_measurements.py does."""

import json
import os
import signal
import time
from pathlib import Path

import torch
from torch_fidelity import metric_kid

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, evaluate, measure
from ldm_dkdm.evaluation import components, frechet, metrics, reference
from ldm_dkdm.files import write_text
from ldm_dkdm.model.ranks import joined, together
from ldm_dkdm.networks import UNet
from tests.parts import UNET_PARAMS, randomised

SIZES = {"images": 150, "chains": 1, "pairs": 1, "steps": 1, "batch_size": 32}


def pixel(shift: float) -> DiffusionModel:
    """A model on 8x8 pixels; models differ by the shift."""
    network = randomised(UNet(**UNET_PARAMS))
    with torch.no_grad():
        next(network.parameters()).add_(shift)
    return DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=8), space="pixel")


def measured(folder: Path) -> dict[str, object]:
    """Figures of a student against its teacher, and what was computed for them here."""
    frechet.IMAGES, calls, shown = 70, [], set()
    places = [
        (reference, "new_reference"),
        (components, "_some"),
        (metrics, "frechet_distance"),
        (metric_kid, "kernel_mmd"),
    ]
    for module, name in places:
        whole = getattr(module, name)
        setattr(module, name, lambda *given, of=whole, name=name, **named: (calls.append(name), of(*given, **named))[1])
    student, teacher = pixel(0), pixel(1)
    figures = evaluate(student, teacher, cache=folder / "cache", progress=lambda w, d, t: shown.add(w), **SIZES)
    metric = measure(student, teacher, metrics=["agreement"], chains=1, pairs=1, steps=1).figures
    asked = {"features": "pixels", "count": 8, "steps": 1, "cache": folder / "cache"}
    kid = measure(student, teacher, metrics=["kid"], **asked).figures
    agreement = {"agreement": metric["agreement"], "kid": kid["KID-pixels"]}
    return {"figures": figures, "calls": calls, "shown": sorted(shown), **agreement}


def refused() -> dict[str, str]:
    """A mistake that the first process alone finds, and then another error of that process."""
    found = {}
    for what, kind in (("refused", UserError), ("failed", KeyError)):

        def work(kind: type[Exception] = kind) -> None:
            raise kind(f"found by process {joined().rank}")

        try:
            joined().on_first(work)
        except (UserError, KeyError) as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


def main(folder: Path) -> None:
    """Measure; then one process dies and the other waits for it."""
    with together() as ranks:
        write_text(folder / f"{ranks.rank}.json", json.dumps(measured(folder) | refused()))
        ranks.wait()
    try:
        with together("go on") as ranks:
            if ranks.rank == 1:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.gather(0)
    except UserError as error:
        write_text(folder / "lost.txt", str(error))
