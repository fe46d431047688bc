"""Open a diffusion model from any file or folder that the package can read."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm_dkdm import checkpoints
from ldm_dkdm.checkpoints import Contents, Hints, Source
from ldm_dkdm.checkpoints.adm import NAME as ADM
from ldm_dkdm.checkpoints.averaging import KIND, weights_kind
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import FirstStageSource, named_first_stage
from ldm_dkdm.checkpoints.hashes import verifying
from ldm_dkdm.checkpoints.loading import build_loaded, load_strictly
from ldm_dkdm.config.effects import heads_without_effect
from ldm_dkdm.config.registry import IGNORED
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageConfig, NetworkConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.model.arguments import require_path
from ldm_dkdm.model.diffusion_model import DiffusionModel
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.pixel import SPACES
from ldm_dkdm.reporting import logger


def load_model(
    path: str | Path,
    *,
    network: nn.Module | None = None,
    precision: str = "32",
    guidance: float = 1.0,
    **hints: Any,
) -> DiffusionModel:
    """Open a diffusion model in any of FORMATS.

    A run folder, a model folder, a run's .ckpt; CompVis's .ckpt; guided-diffusion's, DDPM-IP's and DiT's .pt;
    safetensors; a diffusers pipeline or its UNet2DModel. No code in a file is run.

    Args:
        path: file or folder.
        network: your own module, if the file names a class that the package does not know.
        precision: `auto`, `bf16` or `32`, of its predictions.
        guidance: weight of classifier-free guidance.
        hints: what tensor shapes do not show. Keywords of the network (`image_size`, `num_head_channels`, ...), of the
            forward process (`schedule`, `num_timesteps`, `beta_start`, `beta_end`, `betas`, `space`,
            `rescale_timesteps`), and `target`,
            `parameterization`, `use_ema`, `null_label`, `first_stage` (a path), `scale_factor`. `verify=False` saves
            the time that comparing weights with their hashes takes.

    Raises:
        UserError: a missing, unreadable or refused file, a hint that is missing or contradicts the file.
    """
    require_path(path, "path")
    return open_model(path, Hints.of(**hints), network).changed(precision=precision, guidance=guidance)


def open_model(
    path: str | Path, hints: Hints, network: nn.Module | None = None, lenient: bool = False
) -> DiffusionModel:
    """The same with hints as a record, in float32 and without guidance.

    `lenient`: a model that describes itself ignores what it does not need, since a command with several models passes
    one set of hints to all of them; `hints` of the model are those that it used.
    """
    with verifying(hints.verify is not False):
        contents = checkpoints.read(Source(path))
    hints = hints.spelled_as(contents.params)
    if lenient:
        hints = contents.accepted(hints)
    where = "teacher.params" if hints.sections and not contents.described else "params"
    with _naming_file(contents, hints):
        if network is None and not contents.described:
            _refuse_super_resolution(contents, hints)
            _require_known(contents, hints)
        node, diffusion = contents.network(hints), contents.process(hints)
        if network is None and contents.described and node.target not in NETWORKS:
            raise UserError(
                f"{contents.path}: its network is {node.target}, which this package does not know; "
                "name its file with --plugin FILE.py, or in Python give network=MODULE"
            )
        if network is not None:
            load_strictly(network, contents.weights(hints), contents.file)
        else:
            network = build_loaded(node, where, NETWORKS, contents.weights(hints), contents.file)
        require_outputs(network, where)
        _require_effect(network, hints)
        _mention_rescaling(contents, diffusion, hints)
        return _model_of(contents, hints, network, node, diffusion)


def _refuse_super_resolution(contents: Contents, hints: Hints) -> None:
    """Refuse guided-diffusion's super-resolution models, whose shapes are those of a model of 6-channel states."""
    space = hints.diffusion.get("space", contents.space)
    doubt = checkpoints.super_resolution(contents, hints.key("space"))
    if doubt and space in SPACES and not SPACES[space].encoded:
        raise UserError(f"{contents.path}: {doubt}")


def _require_known(contents: Contents, hints: Hints) -> None:
    """Refuse hints that the network has no parameter for, before those that are missing."""
    target = contents.target if hints.target is None else hints.target
    if target not in NETWORKS:
        return
    parameters = inspect.signature(NETWORKS[target]).parameters
    ignored = () if target.startswith("ldm_dkdm.") else IGNORED
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        hints.require_known([*parameters, *ignored], target, contents.params if hints.target is None else {})


def _require_effect(network: nn.Module, hints: Hints) -> None:
    """Refuse hints that the network, or another hint, leaves without effect; a config's are checked when read."""
    if hints.sections:
        return
    if hints.diffusion.get("variance") is not None and learns_variance(network):
        raise UserError(f"variance: has no effect, since the network predicts its own; {hints.drop}")
    if heads_without_effect(hints.params):
        raise UserError(f"num_heads: has no effect beside num_head_channels; {hints.drop}")


def learns_variance(network: nn.Module) -> bool:
    """Whether a network has twice as many channels out as in, the others for the variance of a reverse step."""
    inputs, outputs = getattr(network, "in_channels", None), getattr(network, "out_channels", None)
    return inputs is not None and outputs == 2 * inputs


@contextmanager
def _naming_file(contents: Contents, hints: Hints) -> Iterator[None]:
    """Prefix a message with the file at fault: the card of a model that describes itself.

    Messages that name the file, or a key that the user's config gives, stay as they are.
    """
    try:
        yield
    except UserError as error:
        from_config = hints.sections and (not contents.described or str(error).partition(":")[0] in hints.given)
        if from_config or str(contents.path) in str(error):
            raise
        raise UserError(f"{contents.path}: {error}") from error


def _mention_rescaling(contents: Contents, diffusion: DiffusionConfig, hints: Hints) -> None:
    """Name the key that a file of improved-diffusion needs where T is not 1000; its tensors do not show it."""
    theirs = contents.format == ADM and contents.diffusion is None
    if theirs and diffusion.num_timesteps != 1000 and not diffusion.rescale_timesteps:
        logger.warning(
            f"{contents.path}: its network is given t = 0 ... {diffusion.num_timesteps - 1}; improved-diffusion's "
            f"take t * 1000 / T by default: {hints.key('rescale_timesteps')}=true"
        )


def _refuse_other_null_label(contents: Contents, hints: Hints, network: nn.Module) -> None:
    """Refuse a hint that contradicts the null label that the model stores or its network defines."""
    own = getattr(network, "null_label", None) if contents.null_label is None else contents.null_label
    if None not in (own, hints.null_label) and own != hints.null_label:
        key = hints.key("null_label")
        raise UserError(f"{key}: {hints.null_label}, but {contents.path}'s label for no class is {own}; {hints.drop}")


def _model_of(
    contents: Contents, hints: Hints, network: nn.Module, node: NetworkConfig, diffusion: DiffusionConfig
) -> DiffusionModel:
    kind = weights_kind(contents, hints)
    _refuse_other_null_label(contents, hints, network)
    model = DiffusionModel(
        network.eval(),
        schedule=schedule_of(diffusion),
        parameterization=node.parameterization,
        space=diffusion.space,
        shape=contents.shape,
        num_classes=contents.num_classes,
        null_label=contents.null_label if hints.null_label is None else hints.null_label,
        first_stage=_stage(contents, hints.first_stage, diffusion, hints.verify is not False),
        node=node,
        info={**contents.info, **({KIND: kind} if kind else {})},
    )
    model.diffusion, model.schedule = diffusion, schedule_of(diffusion)
    file = contents.raw_file if hints.use_ema is False and contents.raw_file else contents.file
    model.path, model.format, model.file = contents.path, contents.format, file
    model.hints, model.described = hints, contents.described
    model.stores_schedule = contents.diffusion is not None
    return model


def _stage(
    contents: Contents, given: FirstStageConfig, diffusion: DiffusionConfig, verify: bool
) -> FirstStageSource | None:
    refuse_in_pixel_space(given, diffusion)
    if not SPACES[diffusion.space].encoded:
        return None
    stage = contents.first_stage
    if given.ckpt is not None and given.scale_factor is None and contents.scale_factor is not None:
        given = replace(given, scale_factor=contents.scale_factor)
    found = named_first_stage(given) if stage is None else stage.changed(given)
    return found and replace(found, verify=verify)


def refuse_in_pixel_space(given: FirstStageConfig, diffusion: DiffusionConfig) -> None:
    """Refuse a first stage, or a key of one, for states that are images.

    Raises:
        UserError: something is given.
    """
    if not SPACES[diffusion.space].encoded and given != FirstStageConfig():
        raise UserError("first_stage: pixel space has none; remove it, or set space=latent")


def require_outputs(network: nn.Module, where: str) -> None:
    """Refuse a number of outputs that is neither the states' channels nor twice as many, for a variance."""
    inputs, outputs = getattr(network, "in_channels", None), getattr(network, "out_channels", None)
    if inputs is not None and outputs is not None and outputs not in (inputs, 2 * inputs):
        raise UserError(f"{where}.out_channels: {outputs} must be {inputs} or {2 * inputs}")
