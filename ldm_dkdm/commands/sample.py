"""Draw images from any model: dkdm sample -r MODEL [MODEL ...] -n 64 [-c STEPS] [-e ETA] [-v] [key=value ...]

Of several models, `2.key=value` is a hint for the second one.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_dkdm.commands.arguments import add_hints, flags, load_plugins
from ldm_dkdm.commands.hints import ScopedHints, split_paths
from ldm_dkdm.commands.places import require_apart, require_outputs, require_replaceable, require_writable
from ldm_dkdm.config.checked import names_of
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.reporting import logger, names_apart

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_dkdm.checkpoints import Hints
    from ldm_dkdm.commands.drawing import Outputs
    from ldm_dkdm.model import DiffusionModel
    from ldm_dkdm.model.ranks import Ranks

DEFAULT_BATCH = SamplingConfig().batch_size
SEEDS = 2**32  # that torch's generator on a CPU tells apart
FLAGS = {
    "count": "--n_samples",
    "steps": "--custom_steps",
    "eta": "--eta",
    "seed": "--seed",
    "batch_size": "--batch_size",
    "labels": "--labels",
    "guidance": "--guidance",
    "sampler": "--sampler",
    "first_stage": "--first_stage",
    "precision": "--precision",
    "device": "--device",
}


def size_or_auto(text: str) -> "int | str":
    """`auto` or a number of images."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or auto, got '{text}'") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """-r -n -c -e -v -l mean what they mean in CompVis's sample script."""
    add = parser.add_argument
    opened = "runs, model folders or checkpoints"
    add("-r", "--resume", required=True, nargs="+", action="extend", metavar="MODEL", help=opened)
    add("-n", "--n_samples", type=int, default=64, help="number of images")
    add("-c", "--custom_steps", type=int, help="sampling steps; default: 200, with ddpm all of them")
    add("--sampler", choices=names_of("ldm_dkdm.diffusion.samplers:SAMPLERS"), help="default: ddim")
    add("-e", "--eta", type=float, default=0.0, help="DDIM's eta: 0 deterministic, 1 ancestral")
    add("-v", "--vanilla_sample", action="store_true", help="--sampler ddpm with every timestep")
    add("-l", "--logdir", type=expanded, help="output folder; default: logs/samples/<model>")
    add("--seed", type=int, default=0, help="image i depends on seed + i only")
    add(
        "--batch_size",
        type=size_or_auto,
        default=DEFAULT_BATCH,
        metavar="B",
        help="images of a call; auto: as many as fill a GPU",
    )
    labels = "class labels, in turn; default: random by seed"
    add("--labels", type=int, nargs="+", action="extend", default=[], help=labels)
    guidance = "classifier-free guidance, for all or each; default: 1, none"
    add("--guidance", type=float, nargs="+", action="extend", default=[], help=guidance)
    add("--raw", action="store_true", help="use the raw weights of a training .ckpt, not EMA")
    add("--npz", action="store_true", help="also write samples.npz (arr_0, uint8 NHWC)")
    add("--latents", action="store_true", help="also write latents.safetensors")
    add("--no_png", action="store_true", help="no PNG per image, only the grid")
    add("--compare", type=expanded, metavar="PNG", help="write labelled grids of all models side by side")
    add("--precision", choices=names_of("ldm_dkdm.device:PRECISIONS"), default="32")
    add("--device", default="auto", help="cpu, cuda, ...")
    compiling = "compile networks and decoders (torch.compile); auto: on a GPU with Triton; images change by rounding"
    add("--compile", nargs="?", const="true", choices=["auto", "true", "false"], default="false", help=compiling)
    add_hints(parser)


def run(options: argparse.Namespace) -> None:
    """Check all models, then sample from each; the comparison's path is the last line."""
    paths, items = split_paths([*options.resume, *options.hints])
    if not paths:
        raise UserError("-r: name at least one model")
    with flags(**FLAGS):
        config = _sampling(options)
    given = options.guidance or [1.0]
    weights = given * len(paths) if len(given) == 1 else given
    if len(weights) != len(paths):
        raise UserError(f"--guidance: {len(weights)} weights for {len(paths)} models; give one, or one for each")
    if min(weights) < 0:
        raise UserError(f"--guidance: must be at least 0, got {min(weights)}")
    if options.compare and options.compare.suffix.lower() != ".png":
        raise UserError(f"--compare: {options.compare} must be a .png")
    require_writable(options.compare, "--compare")
    require_replaceable(options.compare, "--compare", "a PNG image")
    require_writable(options.logdir, "-l", folder=True)
    load_plugins(options.plugin)
    flagged = {"use_ema": False if options.raw else None}
    names = [str(i) for i in range(1, len(paths) + 1)]
    hints, device = ScopedHints(items, names, flagged), options.device
    models = []
    for path, weight, own in zip(paths, weights, map(hints.of, names), strict=True):
        with naming_model(path) if len(paths) > 1 else nullcontext():
            models.append(open_for_sampling(path, weight, config, own, device, options.precision))
    with flags(**({"use_ema": "--raw"} if options.raw else {})):
        hints.require_used(dict(zip(names, models, strict=True)))
    for model in () if options.no_png else models:
        require_png(model)
    from ldm_dkdm.commands.drawing import warn_of_others  # imports torch

    written = {"img": not options.no_png, "samples.npz": options.npz, "latents.safetensors": options.latents}
    for name in names_of_models(models):
        folder = _folder(name, options.logdir, len(models))
        require_outputs(folder, "-l", "grid.png", *(name for name, wanted in written.items() if wanted))
        _require_apart(options.compare, folder)
        if not options.no_png:
            warn_of_others(folder, "-l", options.compare)
    _sample_all(models, config, options)


def _require_apart(compare: Path | None, folder: Path) -> None:
    """Refuse a comparison that would replace images of an output folder."""
    require_apart({"the grid of -l": folder / "grid.png", "--compare": compare}, ())
    if compare is not None and compare.resolve().parent == (folder / "img").resolve():
        raise UserError(f"--compare: {compare} is among the images of -l; name another file")


def _sample_all(models: "Sequence[DiffusionModel]", config: SamplingConfig, options: argparse.Namespace) -> None:
    """Sample from each model, over the ranks that are started, and write the comparison."""
    from ldm_dkdm.commands.drawing import Outputs
    from ldm_dkdm.device import compiles
    from ldm_dkdm.first_stage.codec import decoders
    from ldm_dkdm.images import save_image, side_by_side
    from ldm_dkdm.model.ranks import together
    from ldm_dkdm.networks.modes import compiled

    outputs = Outputs(png=not options.no_png, npz=options.npz, latents=options.latents)
    modules = [module for model in models for module in (model.network, *decoders(model.codec()))]
    with together("the same call goes on with the batches that are drawn") as ranks:
        configs = [_filled(model, config, ranks) if options.batch_size == "auto" else config for model in models]
        names = names_of_models(models)
        folders = [_folder(name, options.logdir, len(models)) for name in names]
        with compiled(modules, compiles(options.compile, models[0].device)):
            made = [_sample(*one, outputs, ranks) for one in zip(models, configs, names, folders, strict=True)]
        panels = [panel for panel in made if panel is not None]
    if options.compare and panels:
        save_image(side_by_side(panels), options.compare)
        print(options.compare)


def _filled(model: "DiffusionModel", config: SamplingConfig, ranks: "Ranks") -> SamplingConfig:
    """The config with batches that fill the model's device."""
    from ldm_dkdm.model.filling import filled

    config = filled(model, config, ranks)
    if ranks.first:
        size = config.batch_size
        logger.info(f"--batch_size auto: batches of {size} images; to go on after a kill, give --batch_size {size}")
    return config


def _sampling(options: argparse.Namespace) -> SamplingConfig:
    """The sampling options of the command line."""
    sampler, steps = options.sampler or "ddim", options.custom_steps
    if options.vanilla_sample:
        if options.sampler not in (None, "ddpm"):
            raise UserError(f"--sampler: {sampler}, but -v is --sampler ddpm with every timestep; give one of them")
        if steps is not None:
            logger.warning("-v takes every timestep; -c is ignored")
        sampler, steps = "ddpm", None
    if not 0 <= options.seed <= SEEDS - max(options.n_samples, 0):
        raise UserError(f"seed: must be at least 0, and below 2^32 for all images, got {options.seed}")
    if steps is not None and steps < 1:
        raise UserError(f"steps: must be at least 1, got {steps}")
    count, batch_size = options.n_samples, DEFAULT_BATCH if options.batch_size == "auto" else options.batch_size
    return SamplingConfig(count, batch_size, options.seed, steps, options.eta, sampler, options.labels)


def open_for_sampling(
    path: str, guidance: float, config: SamplingConfig, hints: "Hints", device: str, precision: str
) -> "DiffusionModel":
    """Open a model on its device and check that it can sample as asked; nothing is written.

    Raises:
        UserError: the flag or hint that does not fit.
    """
    from ldm_dkdm.device import resolve_device
    from ldm_dkdm.model import open_model, require_sampling
    from ldm_dkdm.model.guidance import require_unguided

    with flags(use_ema="--raw", device="--device"):
        where = resolve_device(device)
        model = open_model(path, hints, lenient=True)
    if guidance != 1:
        require_unguided(model, "--guidance", path)
    with flags(**FLAGS):
        model = model.changed(guidance=guidance).to(where, precision)
        require_sampling(model, config)
        model.codec()
    return model


@contextmanager
def naming_model(path: str) -> Iterator[None]:
    """Name the model after the flag or parameter in errors: `--labels: ...` -> `--labels: MODEL: ...`."""
    try:
        yield
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        if not colon or path in str(error):
            raise
        raise UserError(f"{name}: {path}:{rest}") from error


def require_png(model: "DiffusionModel") -> None:
    """Refuse images that a PNG does not hold, before they are sampled."""
    from ldm_dkdm.images import MODES

    if (channels := model.codec().channels) not in MODES:
        raise UserError(
            f"--no_png: {model.path}'s images have {channels} channels, a PNG is grey or RGB; add --no_png, and --npz "
            "for the images (the grid shows their channels side by side)"
        )


def names_of_models(models: "Sequence[DiffusionModel]") -> list[str]:
    """A name for each model, such as quickstart/student; models of one path differ in checkpoint, weights or guidance.

    It comes from the path as it was given: links keep their names. The name of a run's checkpoint ends in its step.
    """
    from ldm_dkdm.checkpoints.averaging import KIND
    from ldm_dkdm.checkpoints.run_checkpoint import NAME

    paths, details = [], []
    for model in models:
        assert model.path is not None and model.file is not None  # set when a model is opened
        home = Path(os.path.normpath(model.path.absolute()))  # `..` goes, links stay
        paths.append(home.with_name(f"{home.name}-{model.file.stem}") if model.format == NAME else home)
        raw = "raw" if model.info.get(KIND) == "raw" else ""
        details.append([raw, f"guidance={model.guidance:g}" if model.guidance != 1 else ""])
    return names_apart(paths, details)


def _folder(name: str, logdir: Path | None, models: int) -> Path:
    name = name.replace("/", "-")
    if logdir is None:
        return Path("logs/samples") / name
    return logdir / name if models > 1 else logdir


def _sample(
    model: "DiffusionModel", config: SamplingConfig, name: str, out: Path, outputs: "Outputs", ranks: "Ranks"
) -> tuple[str, "Image"] | None:
    """Sample, decode and write; returns a label and the grid of the first samples, on the first rank."""
    from ldm_dkdm.commands.drawing import abandoned, draw, earlier

    found = draw(model, name, config, out, outputs, ranks)
    if found is None:
        return None
    label = f"{name}: {model.parameters / 1e6:.1f}M parameters, {found[0]:.2g} images/s"
    written = {"samples.npz": outputs.npz, "latents.safetensors": outputs.latents}
    numbers = range(config.seed, config.seed + config.count) if outputs.png else ()
    for line in earlier(out, "-l", numbers, [name for name, wanted in written.items() if wanted]):
        print(line)
    if left := abandoned(out):
        print(left)
    print(f"{label}: {out}")
    return label, found[1]
