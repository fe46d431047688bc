"""Draw a model's images batch by batch, each kept until all are there: a killed call goes on, and ranks share them."""

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.files import replacing_in, write_tensors
from ldm_dkdm.images import grid, save_image, to_image
from ldm_dkdm.model.ranks import Ranks
from ldm_dkdm.model.sampling import sample_batches, starts_of
from ldm_dkdm.npz import NpzWriter, npz_writer
from ldm_dkdm.reporting import counted, following, logger, size

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_dkdm.model import DiffusionModel

GRID = 64  # most samples in a grid
PARTS = ".parts-"  # begins the names of folders with the batches of a call


@dataclass(frozen=True)
class Outputs:
    """Which files a sampling writes beside the grid."""

    png: bool
    npz: bool
    latents: bool


@dataclass(frozen=True)
class Parts:
    """The batches of one call that are drawn, a file each, in a hidden folder of the output.

    Attributes:
        folder: its name follows from all that decides the images, so that another call does not find them.
        outputs: images are kept for the .npz and the grid only.
    """

    folder: Path
    outputs: Outputs

    def file(self, start: int) -> Path:
        """The file of the batch that begins with this image."""
        return self.folder / f"{start:09d}.safetensors"

    def keep(self, start: int, images: Tensor, states: Tensor, labels: Tensor | None) -> None:
        """Write a batch: images uint8 (B,H,W,C), states (B,C,h,w), labels (B,) if any."""
        used = len(images) if self.outputs.npz else max(0, GRID - start)
        tensors = {"images": images[:used].contiguous()}
        if self.outputs.latents:
            tensors["states"] = states.cpu().contiguous()
        if labels is not None:
            tensors["labels"] = labels.cpu()
        write_tensors(self.file(start), tensors)

    def read(self, starts: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """The batches, in order."""
        for start in starts:
            yield read_tensors(self.file(start))


def parts_of(model: "DiffusionModel", config: SamplingConfig, out: Path, outputs: Outputs) -> Parts:
    """Where a call keeps its batches."""
    compiled = model.network._compiled_call_impl is not None  # it changes images by rounding
    facts = [sampled(model, config).identity(), config.batch_size, model.device.type, vars(outputs), compiled]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return Parts(out / f"{PARTS}{key[:16]}", outputs)


def abandoned(out: Path) -> str | None:
    """A line about the batches of calls that were not finished in an output folder; None where there are none."""
    folders = sorted(folder for folder in out.glob(f"{PARTS}*") if folder.is_dir())
    if not folders:
        return None
    taken = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    names = ", ".join(folder.name for folder in folders)
    return (
        f"{out}: {names}: {size(taken)} of other calls, interrupted or still running; the same call goes on with its "
        f"own; to remove them: rm -r {shlex.quote(str(out))}/{PARTS}*"
    )


def draw(
    model: "DiffusionModel", name: str, config: SamplingConfig, out: Path, outputs: Outputs, ranks: Ranks
) -> tuple[float, "Image"] | None:
    """Sample, decode and write this rank's batches; the first rank then joins all of them.

    Returns:
        Images a second of all ranks and the grid of the first samples; None on other ranks.
    """
    parts, starts, started = parts_of(model, config, out, outputs), starts_of(config), time.monotonic()
    left = ranks.from_first([start for start in starts if not parts.file(start).is_file()])
    done, own, drawn = len(starts) - len(left), ranks.share(left), 0
    if done:
        logger.info(f"{out}: goes on after {done} of {len(starts)} batches that are drawn")
    each = f"up to {counted(config.batch_size, 'image')}"
    with following(ranks.first, f"sampling {name}", "batch", done + len(own), done, each) as show:
        for number, (start, batch) in enumerate(zip(own, sample_batches(model, config, own), strict=True), 1):
            if outputs.png:
                write_pngs(batch.images, out / "img", config.seed + start)
            parts.keep(start, batch.images, batch.states, batch.labels)
            drawn += len(batch.images)
            show(done + number)
    counts = ranks.gather(drawn)
    if not ranks.first:
        return None
    rate = sum(counts) / (time.monotonic() - started)
    sheet = _join(parts, starts, config, out, getattr(model.codec(), "scale_factor", None))
    shutil.rmtree(parts.folder)
    return rate, sheet


def _join(parts: Parts, starts: Sequence[int], config: SamplingConfig, out: Path, scale: float | None) -> "Image":
    """Write samples.npz, latents.safetensors (with their scale) and grid.png from all batches; returns the grid."""
    shown: list[Tensor] = []
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    with ExitStack() as files:
        npz: NpzWriter | None = None
        if parts.outputs.npz:
            npz = files.enter_context(npz_writer(out / "samples.npz", config.count))
        for tensors in parts.read(starts):
            images = tensors["images"]
            if npz:
                npz.add(images, tensors.get("labels"))
            if sum(map(len, shown)) < GRID:
                shown.append(images)
            if parts.outputs.latents:
                latents.append(tensors["states"])
                labels += [tensors["labels"]] if "labels" in tensors else []
    if parts.outputs.latents:
        own = {"labels": torch.cat(labels)} if labels else {}
        metadata = {} if scale is None else {"scale_factor": repr(scale)}
        write_tensors(out / "latents.safetensors", {"latents": torch.cat(latents), **own}, metadata)
    sheet = grid(torch.cat(shown)[:GRID])
    save_image(sheet, out / "grid.png")
    return sheet


def write_pngs(images: Tensor, folder: Path, first: int) -> None:
    """Write images uint8 (N,H,W,C) as 000007.png, ... from the number `first` on; all appear at once."""
    with replacing_in(folder, "png") as temporary:
        for number, image in enumerate(images, first):
            to_image(image).save(temporary / f"{number:06d}.png", format="PNG")
