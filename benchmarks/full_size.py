"""Real distillation steps of the paper's recipes at full size: python benchmarks/full_size.py ffhq256 cifar10+vit19m

RECIPE or RECIPE+STUDENT (a file in configs/students). Writes a checkpoint with random weights in CompVis's or
guided-diffusion's layout (2.4 GB for ffhq256, in a temporary folder), runs `scripts/dkdm_ldm.py` on it at
batch 2 for two steps, and prints seconds of the whole command and its peak memory.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, guarded

from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DistillRun
from ldm_dkdm.device import default_device
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.networks import NETWORKS
from tests.parts import write_compvis_checkpoint

# Runs a command and writes the most memory that it had, in kB. A process that a large one begins counts that memory as
# its own, so this small one begins it.
MEASURED = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""


def main() -> None:
    """Run each recipe in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", help="names of files in configs/")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "32"])
    parser.add_argument("-o", "--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    sizes = {"batch": arguments.batch_size, "steps": arguments.steps, "precision": arguments.precision}
    rows = []
    for recipe in arguments.recipes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(recipe, Path(folder), **sizes))
            print(rows[-1], flush=True)
    finish(arguments.out, default_device("auto"), rows, what="whole commands of the recipes at full size", **sizes)


def write_teacher(config: DistillRun, folder: Path) -> Path:
    """Write a checkpoint of the recipe's teacher with random weights."""
    unet = build(config.teacher, NETWORKS, "teacher.params")
    torch.nn.init.normal_(unet.out[2].weight, std=0.02)  # a new network has zeros there and predicts 0
    if config.diffusion.space == "pixel":
        torch.save(unet.state_dict(), folder / "model.pt")
        return folder / "model.pt"
    vq = build(config.first_stage, FIRST_STAGES, "first_stage.params")
    return write_compvis_checkpoint(folder / "model.ckpt", unet, vq, schedule_of(config.diffusion))


def run(recipe: str, folder: Path, batch: int, steps: int, precision: str) -> dict[str, Any]:
    """Distil from a random teacher for a few steps; seconds and gigabytes.

    Raises:
        UserError: the run has failed.
    """
    name, _, student = recipe.partition("+")
    bases = [ROOT / "configs" / f"{name}.yaml"] + ([ROOT / "configs/students" / f"{student}.yaml"] if student else [])
    checkpoint = write_teacher(load_config(bases), folder)
    command = [sys.executable, str(ROOT / "scripts" / "dkdm_ldm.py"), "--base", *map(str, bases)]
    command += [f"teacher.ckpt={checkpoint}", f"logging.dir={folder}/logs", f"distill.batch_size={batch}"]
    command += [
        "teacher.check=false",  # its weights are random
        f"trainer.max_steps={steps}",
        f"trainer.precision={precision}",
        "logging.name=run",
        "distill.warmup.mode=dpm-solver++",  # the paper's takes millions of calls
        "distill.warmup.images=2",
        "distill.warmup.steps=2",
    ]
    started = time.perf_counter()
    peak = folder / "peak"
    if subprocess.run([sys.executable, "-c", MEASURED, str(peak), *command], check=False).returncode:
        raise UserError(f"{recipe}: failed")
    gigabytes = int(peak.read_text()) * 1024 / 1e9
    return {"recipe": recipe, "s": time.perf_counter() - started, "peak GB": gigabytes}


if __name__ == "__main__":
    guarded(main, "name a smaller --batch_size")
