"""Sampling from a run, a model folder or a training checkpoint."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ldm_dkdm.assemble import Model, load_first_stage, load_model, make_schedule
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.folder import is_model_folder, read_folder
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.config import build
from ldm_dkdm.diffusion.samplers import ddim_timesteps
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import replacing
from ldm_dkdm.generate import SamplerConfig, sample_latents
from ldm_dkdm.images import grid, save_grid, save_image, save_npz, side_by_side
from ldm_dkdm.precision import resolve_precision
from ldm_dkdm.runs.loop import default_device
from ldm_dkdm.schema import FirstStageConfig, ModelCard
from ldm_dkdm.teacher import Teacher


@dataclass(frozen=True)
class Sampled:
    """What one model painted."""

    folder: Path
    label: str
    images: Tensor  # uint8 (N,H,W,3)


def sample(path: Path, arguments: argparse.Namespace) -> Sampled:
    """Sample as the command line of `txt-free_sample.py` asks, and write the files."""
    model, home = find_model(path)
    device = _device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    codec, _ = load_first_stage(FirstStageConfig(), model, precision)
    schedule = make_schedule(model.card.diffusion)
    denoiser = Teacher(model.network, schedule, model.card.network.parameterization, precision).to(device)
    config = SamplerConfig(
        arguments.n_samples,
        arguments.batch_size,
        arguments.seed,
        arguments.custom_steps,
        arguments.eta,
        arguments.vanilla_sample,
    )
    if not config.vanilla:
        ddim_timesteps(schedule.num_timesteps, config.steps)  # refuses what does not fit before anything runs
    started = time.monotonic()
    latents, images = [], []
    with tqdm(total=config.count, desc=f"sampling {home.name}", unit="image") as bar:
        for batch in sample_latents(denoiser.predict, schedule, model.latent_shape, config, device):
            latents.append(batch.cpu())
            images.append(codec.to(device).decode(batch).cpu())
            bar.update(len(batch))
    seconds = time.monotonic() - started
    out = (
        (arguments.logdir / home.name if len(arguments.resume) > 1 else arguments.logdir)
        if arguments.logdir
        else home / "samples"
    )
    pictures = torch.cat(images)
    write(out, pictures, torch.cat(latents), arguments)
    parameters = sum(p.numel() for p in model.network.parameters()) / 1e6
    label = f"{home.name}: {parameters:.1f}M parameters, {len(pictures) / seconds:.1f} images/s"
    print(label)
    return Sampled(out, label, pictures)


def _device(name: str) -> torch.device:
    if name == "auto":
        return default_device("auto")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error


def write(folder: Path, images: Tensor, latents: Tensor, arguments: argparse.Namespace) -> None:
    """Write grid.png, and what else was asked for."""
    save_grid(images, folder / "grid.png")
    if not arguments.no_png:
        for i, image in enumerate(images):
            save_image(Image.fromarray(image.numpy()), folder / "img" / f"{arguments.seed + i:06d}.png")
    if arguments.npz:
        save_npz(images, folder / "samples.npz")
    if arguments.latents:
        with replacing(folder / "latents.safetensors") as temporary:
            save_file({"latents": latents}, temporary)


def compare(outputs: list[Sampled], path: Path) -> None:
    """One labelled picture of what several models painted from the same noise."""
    save_image(side_by_side([(output.label, grid(output.images)) for output in outputs]), path)


def find_model(path: Path) -> tuple[Model, Path]:
    """The model at a run folder, a model folder or a training checkpoint, and the folder it lives in."""
    if is_model_folder(path / "student"):
        return load_model(path / "student"), path / "student"
    if path.suffix == ".ckpt" and path.is_file():
        return _from_training_checkpoint(path)
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the run has no student/ yet; let it save once, or go on with --resume {path}")
    if is_model_folder(path):
        return load_model(path), path
    raise UserError(f"{path}: no run, model folder (config.yaml and weights) or training checkpoint")


def _from_training_checkpoint(path: Path) -> tuple[Model, Path]:
    """The EMA weights of a training checkpoint; the run's student folder says what they are."""
    folder = path.parent.parent / "student"
    if not is_model_folder(folder):
        raise UserError(f"{path}: no {folder}/config.yaml beside it that says what the weights are")
    card, _ = read_folder(folder, ModelCard)
    network = build(card.network, f"{folder}/config.yaml: network.params")
    prefix = "network."
    tensors = {k.removeprefix(prefix): v for k, v in read_tensors(path).items() if k.startswith(prefix)}
    load_strictly(network, tensors, path)
    pointer = folder / card.first_stage.path if card.first_stage else None
    return Model(network, card, pointer), folder
