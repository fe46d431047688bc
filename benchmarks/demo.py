"""The figures of the demo's student beside its teacher's: python benchmarks/demo.py logs/quickstart

A teacher beside itself is its samples with other seeds. Images a second are of DPM-Solver++ with decoding, both
models in turns.
"""

import argparse
from pathlib import Path
from typing import Any

from common import finish, guarded, interleaved, teacher_of

import ldm_dkdm as dkdm
from ldm_dkdm.device import default_device
from ldm_dkdm.networks.cost import gflops

QUARTERS = ("q1", "q2", "q3", "q4")
METRICS = ("pixel-frechet", "fd", "kid")


def main() -> None:
    """Time, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--count", type=int, default=512, help="images of each model whose distances are measured")
    parser.add_argument("-c", "--steps", type=int, default=20, help="DDIM steps of those images")
    parser.add_argument(
        "--chains", type=int, default=16, help="chains of the teacher that give the states of the agreement"
    )
    parser.add_argument("-n", "--images", type=int, default=64, help="images whose sampling is timed")
    parser.add_argument("--timed_steps", type=int, default=30, help="DPM-Solver++ steps of the timed sampling")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    options = parser.parse_args()
    device = default_device("auto")
    teacher, student = teacher_of(options.run), dkdm.load_model(options.run)
    models = {"teacher": teacher, "student": student}
    own = {name: figures_of(model, teacher, options) for name, model in models.items()}  # in the models' precision
    models = {name: model.to(device, "auto") for name, model in models.items()}
    work = {
        name: lambda model=model: model.sample(options.images, steps=options.timed_steps, sampler="dpm-solver++")
        for name, model in models.items()
    }
    seconds = interleaved(work, options.rounds, device)
    for name, model in models.items():
        cost = {"M parameters": model.parameters / 1e6, "GFLOPs a call": gflops(model.network, model.shape)}
        own[name] = {**cost, "images/s": options.images / seconds[name], **own[name]}
    rows = [
        {"figure": figure, **{name: found.get(figure, "") for name, found in own.items()}} for figure in own["student"]
    ]
    facts = {"what": "the demo's student beside its teacher", "count": options.count, "steps": options.steps}
    finish(options.out, device, rows, **facts, chains=options.chains)


def figures_of(model: dkdm.DiffusionModel, teacher: dkdm.DiffusionModel, options: argparse.Namespace) -> dict[str, Any]:
    """Distances to the teacher's samples; a student's agreement by quarters of t too, trained and untrained."""
    sizes = {"features": "efficientnet-lite0", "count": options.count, "steps": options.steps, "progress": True}
    found = dict(dkdm.measure(model, teacher, metrics=METRICS, **sizes).figures)
    if model is teacher:
        return found
    agreement = dkdm.measure(model, teacher, metrics=["agreement"], chains=options.chains, steps=options.steps).figures
    names = [f"{kind}_{quarter}" for kind in ("agreement", "untrained") for quarter in QUARTERS]
    return {"agreement": agreement["agreement"], **{name: agreement[name] for name in names}, **found}


if __name__ == "__main__":
    guarded(main, "lower -n")
