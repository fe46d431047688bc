"""Sampling from a run, a model folder or a training checkpoint."""

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_dkdm.assemble import Codec, find_model, load_first_stage
from ldm_dkdm.config.schema import FirstStageConfig
from ldm_dkdm.device import default_device, resolve_precision
from ldm_dkdm.diffusion.samplers import ddim_timesteps
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import write_tensors
from ldm_dkdm.generate import SamplerConfig, sample_states
from ldm_dkdm.images import grid, npz_writer, save_image, side_by_side
from ldm_dkdm.sources import Model
from ldm_dkdm.teacher import Teacher

GRID = 64  # pictures on a grid, at most


@dataclass(frozen=True)
class Painter:
    """A model on its device, ready to sample."""

    home: Path  # the model's folder
    model: Model
    denoiser: Teacher
    codec: Codec
    device: torch.device

    @property
    def name(self) -> str:
        """The last two folders, such as quickstart/student."""
        return f"{self.home.resolve().parent.name}/{self.home.name}"


def prepare(path: Path, guidance: float, arguments: argparse.Namespace) -> Painter:
    """Load a model as the command line of `txt-free_sample.py` asks; nothing is written."""
    model, home = find_model(path, arguments.raw)
    device = _device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    if model.first_stage is None and model.space.encoded and not arguments.first_stage:
        raise UserError(f"--first_stage: {path} does not say where its first stage lies; name that folder")
    if guidance != 1 and model.network.num_classes is None:
        raise UserError(f"--guidance: {path} is an unconditional model; leave it out")
    first_stage = FirstStageConfig(ckpt=arguments.first_stage)
    codec, _ = load_first_stage(first_stage, model, precision)
    if guidance != 1 and "teacher" in model.card.info:
        raise UserError(f"--guidance: {path} is a student and learned the guided prediction itself; give it 1")
    denoiser = model.as_teacher(precision, guidance)
    ddim_timesteps(denoiser.schedule.num_timesteps, arguments.custom_steps or 1)  # refuses what does not fit
    _check_labels(arguments.labels, denoiser, home)
    return Painter(home, model, denoiser.to(device), codec.to(device), device)


def _check_labels(labels: Sequence[int], denoiser: Teacher, home: Path) -> None:
    if labels and denoiser.num_classes is None:
        raise UserError(f"--labels: {home} is an unconditional model; leave them out")
    outside = [label for label in labels if label not in (denoiser.classes or ())]
    if outside:
        raise UserError(f"--labels: {outside[0]} is none of the {len(denoiser.classes)} classes of {home}")


def sample(
    painter: Painter, config: SamplerConfig, out: Path, arguments: argparse.Namespace
) -> tuple[str, Image.Image]:
    """Sample, decode and write batch by batch; returns a label and the grid of the first pictures."""
    denoise, schedule, shape = painter.denoiser.predict, painter.denoiser.schedule, painter.model.latent_shape
    started = time.monotonic()
    steps = config.steps or schedule.num_timesteps
    config = replace(config, steps=steps)
    latents, first = [], []
    with ExitStack() as files:
        npz = files.enter_context(npz_writer(out / "samples.npz", config.count)) if arguments.npz else None
        bar = files.enter_context(tqdm(total=config.count, desc=f"sampling {painter.name}", unit="image"))
        for batch, label in sample_states(denoise, schedule, shape, config, painter.device, painter.denoiser.classes):
            pictures = painter.codec.decode(batch).cpu()
            if not arguments.no_png:
                _write_png(pictures, out / "img", config.seed + bar.n)
            if npz:
                npz.add(pictures, None if label is None else label.cpu())
            if bar.n < GRID:
                first.append(pictures)
            if arguments.latents:
                latents.append(batch.cpu())
            bar.update(len(batch))
    rate = config.count / (time.monotonic() - started)
    sheet = grid(torch.cat(first)[:GRID])
    save_image(sheet, out / "grid.png")
    if arguments.latents:
        write_tensors(out / "latents.safetensors", {"latents": torch.cat(latents)})
    millions = sum(p.numel() for p in painter.model.network.parameters()) / 1e6
    return f"{painter.name}: {millions:.1f}M parameters, {rate:.2g} images/s", sheet


def _write_png(images: Tensor, folder: Path, first: int) -> None:
    for i, image in enumerate(images, first):
        save_image(Image.fromarray(image.numpy()), folder / f"{i:06d}.png")


def sample_all(paths: list[Path], config: SamplerConfig, arguments: argparse.Namespace) -> None:
    """Sample from every model after all are found to work; the comparison's path is the last line."""
    weights = arguments.guidance * len(paths) if len(arguments.guidance) == 1 else arguments.guidance
    if len(weights) != len(paths):
        raise UserError(f"--guidance: {len(weights)} weights for {len(paths)} models; give one, or one for each")
    for folder in (arguments.logdir, arguments.compare and arguments.compare.parent):
        _check_writable(folder)
    painters = [prepare(path, weight, arguments) for path, weight in zip(paths, weights, strict=True)]
    panels = []
    for painter in painters:
        name = painter.name.replace("/", "-")
        out = arguments.logdir or Path("logs/samples") / name
        if arguments.logdir and len(painters) > 1:
            out = out / name
        panels.append(sample(painter, config, out, arguments))
        others = 0 if arguments.no_png else len(list((out / "img").glob("*.png"))) - config.count
        if others > 0:
            print(f"{out}/img: holds {others} pictures of earlier calls too; -l names another folder")
        print(f"{panels[-1][0]}: {out}")
    if arguments.compare:
        save_image(side_by_side(panels), arguments.compare)
        print(arguments.compare)


def _check_writable(folder: Path | None) -> None:
    """Refuse, before the work, an output folder that is a file or lies below one."""
    for place in [folder, *folder.parents] if folder else []:
        if place.exists() and not place.is_dir():
            raise UserError(f"-l: {place} is a file; name a folder")


def _device(name: str) -> torch.device:
    if name == "auto":
        return default_device("auto")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
