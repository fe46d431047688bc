"""Draw a model's images batch by batch, each kept until all are there: a killed call goes on, and ranks share them."""

import hashlib
import json
import shlex
import shutil
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.files import make_folder, replacing_in, write_tensors
from ldm_dkdm.images import SAMPLED, grid, images_beside, save_image, to_image
from ldm_dkdm.model.ranks import Ranks
from ldm_dkdm.model.sampling import sample_batches, starts_of
from ldm_dkdm.npz import NpzWriter, npz_writer
from ldm_dkdm.reporting import counted, following, logger, size

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_dkdm.model import DiffusionModel

GRID = 64  # most samples in a grid
PARTS = ".parts-"  # begins the names of folders with the batches of a call
LOOKED_AT = 10_000  # files in an output folder among which images of others are looked for
PNGS = "png_sha256"  # key of the PNG files' hash in the metadata of a batch's file


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
        outputs: images are kept for the .npz and the grid only; the PNG files of a batch are in `img` already.
    """

    folder: Path
    outputs: Outputs

    def file(self, start: int) -> Path:
        """The file of the batch that begins with this image."""
        return self.folder / f"{start:09d}.safetensors"

    def keep(self, start: int, images: Tensor, states: Tensor, labels: Tensor | None, pngs: str | None = None) -> None:
        """Write a batch: images uint8 (B,H,W,C), states (B,C,h,w), labels (B,) if any, the hash of its PNG files."""
        used = len(images) if self.outputs.npz else max(0, GRID - start)
        tensors = {"images": images[:used].contiguous()}
        if self.outputs.latents:
            tensors["states"] = states.cpu().contiguous()
        if labels is not None:
            tensors["labels"] = labels.cpu()
        write_tensors(self.file(start), tensors, {} if pngs is None else {PNGS: pngs})

    def holds(self, start: int, pngs: Sequence[Path]) -> bool:
        """Whether a batch is drawn and its PNG files, if there should be any, are those that were written with it."""
        if not self.file(start).is_file():
            return False
        if not self.outputs.png:
            return True
        try:
            with safe_open(self.file(start), framework="pt") as file:
                written = (file.metadata() or {}).get(PNGS)
            if written is None:  # an older version began the call
                return all(png.is_file() for png in pngs)
            return written == hash_of(pngs)
        except (OSError, SafetensorError):  # a file is gone, or is damaged
            return False

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


def earlier(out: Path, flag: str, numbers: Iterable[int], written: Container[str]) -> list[str]:
    """Lines about what earlier calls left in an output folder.

    Args:
        out: the folder.
        flag: what named it.
        numbers: those of the PNG files that this call has written.
        written: names of the other files that it has written, or read.
    """
    others = len(set((out / "img").glob("*.png")) - set(pngs_of(out / "img", numbers)))
    new = [name for name in SAMPLED if name in written and (out / name).is_file()]
    lacking = f", not in {' and '.join(new)}" if new else ""
    kept = [f"{out}/img: also holds {counted(others, 'image')} of earlier calls{lacking}"] if others else []
    files = [name for name in SAMPLED if name not in written and (out / name).is_file()]
    kept += [f"{out}/{name}: is of an earlier call" for name in files]
    return [f"{line}; {flag} names another folder" for line in kept]


def warn_of_others(out: Path, flag: str, *own: Path | None) -> None:
    """Warn of other images in an output folder, which are not read beside its `img`.

    Args:
        out: the folder.
        flag: what named it.
        own: files that this call writes.
    """
    kept = {path.absolute() for path in own if path is not None}
    with suppress(OSError):  # a folder below that must not be read
        found = next((file for file in images_beside(out, LOOKED_AT) if file.absolute() not in kept), None)
        if found is not None:
            logger.warning(
                f"{flag}: {out} also holds other images, such as {found.relative_to(out)}; where {out} is named as a "
                f"set of images or data, those in {out}/img alone are read; name another folder to keep both apart"
            )


def draw(
    model: "DiffusionModel", name: str, config: SamplingConfig, out: Path, outputs: Outputs, ranks: Ranks
) -> tuple[float, "Image"] | None:
    """Sample, decode and write this rank's batches; the first rank then joins all of them.

    Returns:
        Images a second of all ranks and the grid of the first samples; None on other ranks.

    Raises:
        UserError: another process draws the same images there.
    """
    parts = ranks.from_first(parts_of(model, config, out, outputs))  # predictions of ranks may differ by rounding
    with ExitStack() as held:
        left = ranks.on_first(lambda: held.enter_context(_alone(parts.folder, out)) or _left(parts, config, out))
        return _drawn(model, name, config, out, parts, left, ranks)


@contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """Lock the folder of a call's batches against the same call in another process; the lock ends with the process.

    Raises:
        UserError: another process draws them.
    """
    make_folder(out)
    lock = folder.with_name(f"{folder.name}.lock")
    with lock.open("a") as file:
        with suppress(ImportError, OSError):  # some systems and file systems have no locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{out}: another process draws the same images there; wait, or name another folder"
                ) from error
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def _drawn(
    model: "DiffusionModel",
    name: str,
    config: SamplingConfig,
    out: Path,
    parts: Parts,
    left: Sequence[int],
    ranks: Ranks,
) -> tuple[float, "Image"] | None:
    """Draw this rank's share of the batches that are left, and join all, as `draw` says."""
    starts, started, outputs = starts_of(config), time.monotonic(), parts.outputs
    done, own, drawn = len(starts) - len(left), ranks.share(left), 0
    if done:
        logger.info(f"{out}: goes on after {done} of {len(starts)} batches that are drawn")
    each = f"up to {counted(config.batch_size, 'image')}"
    with following(ranks.first, f"sampling {name}", "batch", done + len(own), done, each) as show:
        for number, (start, batch) in enumerate(zip(own, sample_batches(model, config, own), strict=True), 1):
            pngs = write_pngs(batch.images, out / "img", config.seed + start) if outputs.png else None
            parts.keep(start, batch.images, batch.states, batch.labels, pngs)
            drawn += len(batch.images)
            show(done + number)
    counts = ranks.gather(drawn)
    if not ranks.first:
        return None
    rate = sum(counts) / (time.monotonic() - started)
    sheet = _join(parts, starts, config, out, getattr(model.codec(), "scale_factor", None))
    shutil.rmtree(parts.folder)
    return rate, sheet


def _left(parts: Parts, config: SamplingConfig, out: Path) -> list[int]:
    """The batches that are to be drawn."""
    ends = {start: min(start + config.batch_size, config.count) for start in starts_of(config)}
    numbers = {start: range(config.seed + start, config.seed + end) for start, end in ends.items()}
    left = [start for start, own in numbers.items() if not parts.holds(start, pngs_of(out / "img", own))]
    again = sum(parts.file(start).is_file() for start in left)
    if again:
        batches = counted(again, "batch")
        logger.info(f"{out}: {batches} of this call must be drawn again: the images in img are gone or another call's")
    return left


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


def pngs_of(folder: Path, numbers: Iterable[int]) -> list[Path]:
    """The PNG files of images with these numbers."""
    return [folder / f"{number:06d}.png" for number in numbers]


def write_pngs(images: Tensor, folder: Path, first: int) -> str:
    """Write images uint8 (N,H,W,C) as 000007.png, ... from the number `first` on; all appear at once.

    Returns:
        `hash_of` the files.
    """
    with replacing_in(folder, "png") as temporary:
        files = pngs_of(temporary, range(first, first + len(images)))
        for file, image in zip(files, images, strict=True):
            to_image(image).save(file, format="PNG")
        return hash_of(files)


def hash_of(files: Iterable[Path]) -> str:
    """SHA-256 of the content of files, in order.

    Raises:
        OSError: one is missing.
    """
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
