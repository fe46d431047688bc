"""Decode latents in a file: dkdm decode LATENTS.{npz,pt,safetensors} --first_stage DIR -o OUT"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_dkdm.commands.arguments import flags
from ldm_dkdm.commands.places import arrays_of_images, require_apart, require_outputs
from ldm_dkdm.config.checked import names_of
from ldm_dkdm.config.schema import FirstStageConfig, SamplingConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 1e6  # magnitude of a latent
ASSUMED = 256  # side in pixels of the images of a first stage in a file, which does not say it
LARGER = 64  # most positions of latents, in units of the first stage's own; attention takes the square


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, the first stage, the output folder."""
    add = parser.add_argument
    shown = "(N,C,h,w): arr_0 of an .npz (labels: arr_1), or the one tensor of a .pt or .safetensors (and labels)"
    add("latents", type=expanded, help=shown)
    add(
        "--first_stage",
        type=expanded,
        required=True,
        metavar="DIR",
        help="first-stage folder, or a file that holds one",
    )
    add("-o", "--out", type=expanded, required=True)
    add("--scale_factor", type=float, help="default: that of LATENTS, else the folder's own")
    add("--batch_size", type=int, default=16)
    add("--precision", choices=names_of("ldm_dkdm.device:PRECISIONS"), default="32", help="as in dkdm sample")
    add("--device", default="auto", help="cpu, cuda, ...")


def run(options: argparse.Namespace) -> None:
    """Decode, write a grid, PNG files and an ADM-style .npz."""
    require_apart({"--out": options.out / "samples.npz"}, [options.latents])
    require_outputs(options.out, "--out", "grid.png", "samples.npz", "img")
    with flags(scale_factor="--scale_factor", batch_size="--batch_size"):
        SamplingConfig(batch_size=options.batch_size)
        FirstStageConfig(scale_factor=options.scale_factor)  # refuses what no latents have
    from ldm_dkdm.commands.drawing import warn_of_others  # imports torch

    warn_of_others(options.out, "--out")
    numbers = {name: getattr(options, name) for name in ("scale_factor", "batch_size", "precision", "device")}
    count = decode_file(options.latents, options.first_stage, options.out, **numbers)
    print(f"{count} images: {options.out}")


@dataclass(frozen=True)
class Latents:
    """What a file of latents holds.

    Attributes:
        states: float32 (N,C,h,w).
        labels: int64 (N,), if any.
        scale_factor: their scale, where the file has it.
    """

    states: "Tensor"
    labels: "Tensor | None" = None
    scale_factor: float | None = None


def read_latents(path: Path, scale_factor: float | None = None) -> Latents:
    """The one tensor (N,C,h,w) in an .npz (`arr_0`), .pt or .safetensors file, and its labels (`arr_1`, `labels`).

    Args:
        path: the file.
        scale_factor: holds in place of the one in the file's metadata, which is not read then.

    Raises:
        UserError: no latents, or labels that are not one whole number for each.
    """
    import torch

    from ldm_dkdm.checkpoints import Source, read_tensors
    from ldm_dkdm.npz import is_npz, read_npz

    stated = None
    if is_npz(path):
        latents, numbers = torch.from_numpy(read_npz(path)), read_npz(path, "arr_1")
        labels = None if numbers is None else torch.from_numpy(numbers)
    else:
        tensors = dict(read_tensors(path))
        labels = tensors.pop("labels", None) if len(tensors) == 2 else None
        if len(tensors) != 1:
            raise UserError(f"{path}: expected one tensor, found {len(tensors)}: {', '.join([*tensors][:4])}")
        latents = next(iter(tensors.values()))
        stated = Source(path).metadata.get("scale_factor") if path.is_file() else None
    if latents.dtype == torch.uint8:
        raise UserError(f"{path}: holds images already (uint8), not latents; dkdm sample --latents writes those")
    if latents.ndim != 4 or latents.numel() == 0:
        raise UserError(f"{path}: latents are (N,C,h,w), none of them 0, found {tuple(latents.shape)}")
    if not latents.is_floating_point():
        raise UserError(f"{path}: holds {latents.dtype}, latents are floating-point numbers")
    latents = latents.float()
    if not latents.abs().max() <= LARGEST:  # also refuses NaN
        raise UserError(f"{path}: holds values that are not finite, or beyond {LARGEST:g}; no latents are")
    return Latents(latents, _labels(path, labels, len(latents)), scale_factor or _scale(path, stated))


def _scale(path: Path, stated: str | None) -> float | None:
    """The scale in a file's metadata."""
    try:
        return None if stated is None else FirstStageConfig(scale_factor=float(stated)).scale_factor
    except (ValueError, UserError) as error:
        raise UserError(
            f"{path}: scale_factor in its metadata: {error}; give the right one as --scale_factor"
        ) from error


def _labels(path: Path, labels: "Tensor | None", count: int) -> "Tensor | None":
    """The labels of `count` latents as int64."""
    import torch

    if labels is None:
        return None
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if not whole or labels.shape != (count,):
        kind = f"{labels.dtype} {tuple(labels.shape)}"
        raise UserError(f"{path}: labels of {count} latents are as many whole numbers, found {kind}; leave them out")
    return labels.long()


def _require_kept(place: Path, path: Path, labeled: bool) -> None:
    """Refuse to write images over labels that the latents do not have."""
    if "arr_1" in arrays_of_images(place, "--out") and not labeled:
        raise UserError(f"--out: {place} exists and holds labels (arr_1), which {path} does not; name another folder")


def decode_file(
    path: Path,
    first_stage: Path,
    out: Path,
    *,
    scale_factor: float | None,
    batch_size: int,
    precision: str,
    device: str,
) -> int:
    """Decode a file of latents into `out`: grid.png, img/*.png, samples.npz; returns how many images."""
    import torch

    from ldm_dkdm.checkpoints import Source
    from ldm_dkdm.checkpoints.first_stages import FirstStageSource
    from ldm_dkdm.commands.drawing import earlier, write_pngs
    from ldm_dkdm.device import resolve_device, resolve_precision
    from ldm_dkdm.images import MODES, grid, save_image
    from ldm_dkdm.npz import save_npz
    from ldm_dkdm.reporting import following, logger

    with flags(device="--device"):
        place = resolve_device(device)
    found = read_latents(path, scale_factor)
    latents = found.states
    _require_kept(out / "samples.npz", path, found.labels is not None)
    stage, arithmetic = FirstStageSource(first_stage, found.scale_factor), resolve_precision(precision, place)
    alone = not Source(first_stage).is_folder
    codec = stage.codec(latents.shape[-1] if alone else None, arithmetic).to(place)  # the side changes no parameter
    own = max(ASSUMED // codec.downsampling, 1) if alone else codec.latent_size
    if latents.shape[1] != codec.latent_channels:
        raise UserError(f"{path}: {latents.shape[1]} channels, but {first_stage} decodes {codec.latent_channels}")
    if latents[0, 0].numel() > LARGER * own**2:
        made = f"is taken to be made for images of {ASSUMED} x {ASSUMED}, latents of" if alone else "is made for"
        sides = f"{latents.shape[2]} x {latents.shape[3]}, but {first_stage} {made} {own} x {own}"
        raise UserError(f"{path}: latents of {sides}; at most {LARGER} times as many positions work")
    parts = []
    with following(True, "decoding", "image", len(latents)) as done:
        for batch in latents.split(batch_size):
            parts.append(codec.decode(batch.to(place)).cpu())
            done(sum(map(len, parts)))
    images = torch.cat(parts)
    save_npz(images, out / "samples.npz", found.labels)
    png = codec.channels in MODES
    if png:
        write_pngs(images, out / "img", 0)
    else:
        logger.warning(f"{out}: images of {codec.channels} channels are in samples.npz only, a PNG is grey or RGB")
    save_image(grid(images), out / "grid.png")
    read = [path.name] if path.resolve().parent == out.resolve() else []
    for line in earlier(out, "--out", range(len(images) if png else 0), ["samples.npz", *read]):
        logger.info(line)
    return len(images)
