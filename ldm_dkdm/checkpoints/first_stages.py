"""Open first stages: folders of this package or of diffusers, and files that hold one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_dkdm.checkpoints.config_files import require_first_stage
from ldm_dkdm.checkpoints.diffusers_first_stage import CLASSES, first_stage_part, read_component
from ldm_dkdm.checkpoints.hashes import verifying
from ldm_dkdm.checkpoints.loading import build_loaded
from ldm_dkdm.checkpoints.reading import read_named_weights
from ldm_dkdm.checkpoints.releases import how_to_get
from ldm_dkdm.checkpoints.shapes import TOO_FEW, count_blocks, multiples, under
from ldm_dkdm.checkpoints.source import Source, has_config, read_json
from ldm_dkdm.checkpoints.state_dicts import FIRST_STAGE, prefixes_of, unwrapped
from ldm_dkdm.config.load import card_kind, read_card
from ldm_dkdm.config.schema import FirstStageCard, FirstStageConfig
from ldm_dkdm.errors import UserError, naming
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.reporting import logger

ADVICE = "name a first-stage folder of this package or of diffusers, or a checkpoint that holds a first stage"
HOW_TO_NAME = "give the first stage's file or folder (first_stage=PATH, in a config first_stage.ckpt)"
UNSCALED = "stores no scale_factor; 1 is taken"  # CompVis's where latents are not scaled
ALONE = "is diffusers' first stage without the config.json that describes it; name the folder that holds both"
PREFIX = "first_stage_model."  # name of the first stage in CompVis's files


@dataclass(frozen=True)
class FirstStageSource:
    """Path and description of a model's first stage, which is opened on first use.

    Attributes:
        path: folder or file.
        scale_factor: scale of the latents; None: the stored one, else 1.
        target, params: the autoencoder; None: as stored or inferred.
        tensors: the autoencoder's, under its own names, if they were read with the model.
        stored: the scale as the same file stores it.
        verify: compare its weights with the hash that they were written with.
        doubt: why the scale may be another one; empty where a file or a user states it.
    """

    path: Path
    scale_factor: float | None = None
    target: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    stored: Tensor | None = field(default=None, repr=False, compare=False)
    doubt: str = field(default="", compare=False)
    verify: bool = field(default=True, compare=False)

    @property
    def scale(self) -> float | None:
        """The scale that is given or stored; None where neither is.

        Raises:
            UserError: the stored one is not a number above 0.
        """
        if self.scale_factor is not None or self.stored is None:
            return self.scale_factor
        stored = self.stored
        if stored.numel() != 1 or not stored.is_floating_point() or not 0 < stored.item() < math.inf:
            raise UserError(
                f"{self.path}: scale_factor is not a number above 0; "
                "give it (scale_factor=NUMBER, in a config first_stage.scale_factor)"
            )
        return stored.item()

    def opened(self, latent_size: int | None = None) -> "FirstStageSource":
        """A copy with target, params, scale and tensors filled in.

        Args:
            latent_size: side of the latents, which tensor shapes do not show; None where the path describes itself.

        Raises:
            UserError: no first stage, or an incomplete one.
        """
        if self.tensors is not None:
            return replace(self, scale_factor=self.scale)._inferred(self.tensors, latent_size)
        source = Source(self.path)
        if source.is_folder:
            return replace(self._of_folder(source, latent_size), path=source.path)
        if not source.path.is_file():
            raise UserError(f"first_stage: {self.path} is missing; {how_to_get(self.path, ADVICE)}")
        if is_of_diffusers(source):
            found = FirstStageSource(source.path, **read_component(source.path.parent, latent_size, source.path))
            return self._scaled(found)
        found = replace(self, tensors=tensors_of(source.tensors), stored=source.tensors.get("scale_factor"))
        return found.opened(latent_size)

    def _of_folder(self, source: Source, latent_size: int | None) -> "FirstStageSource":
        if is_first_stage_folder(source.path):
            if self.target is not None or self.params:
                raise UserError(f"first_stage: {self.path} describes itself; remove target and params")
            card = read_card(source.path / "config.yaml", FirstStageCard)
            tensors = read_named_weights(source.path, card.weights)
            found = FirstStageSource(source.path, card.scale_factor, card.target, card.params, tensors)
        else:
            folder = component_of(source)
            found = FirstStageSource(source.path, **read_component(folder, latent_size))
        return self._scaled(found)

    def _scaled(self, found: "FirstStageSource") -> "FirstStageSource":
        """The first stage of a folder or file that describes itself, with the scale that is given."""
        if self.scale_factor is None:
            return found
        return replace(found, scale_factor=self.scale_factor, doubt=self.doubt)

    def _inferred(self, tensors: Mapping[str, Tensor], latent_size: int | None) -> "FirstStageSource":
        if self.target is not None:
            return replace(self, tensors=tensors)
        if latent_size is None:
            raise UserError(f"first_stage: {self.path} is not a first-stage folder; give its target and params")
        target, params = infer_first_stage(tensors, latent_size, self.path)
        require_first_stage(self.path, params)
        return replace(self, target=target, params=params, tensors=tensors)

    def codec(self, latent_size: int | None = None, precision: str = "32") -> LatentCodec:
        """The autoencoder with its weights, ready to encode and decode.

        Raises:
            UserError: no first stage, or tensors that do not fit it.
        """
        with verifying(self.verify):
            stage = self.opened(latent_size)
        with naming("first_stage"):
            FirstStageConfig(scale_factor=stage.scale_factor)  # refuses what no latents have
        where = f"{stage.path}: params" if self.target is None else "first_stage.params"
        autoencoder = build_loaded(stage, where, FIRST_STAGES, stage.tensors or {}, stage.path)
        doubt = stage.doubt if stage.scale_factor else UNSCALED
        if doubt:
            logger.warning(f"{stage.path}: {doubt}; another is set as scale_factor")
        return LatentCodec(autoencoder, stage.scale_factor or 1.0, precision, stage.target, stage.params, doubt)

    def changed(self, config: FirstStageConfig) -> "FirstStageSource":
        """A copy with the user's values; the scale stays the diffusion model's, whichever file is named."""
        scale, doubt = config.scale_factor or self.scale, "" if config.scale_factor else self.doubt
        if config.ckpt is not None:
            return FirstStageSource(Path(config.ckpt), scale, config.target, config.params, doubt=doubt)
        if config.target is None:
            return replace(self, scale_factor=scale, doubt=doubt)
        return replace(self, scale_factor=scale, target=config.target, params=config.params, doubt=doubt)


def named_first_stage(config: FirstStageConfig) -> FirstStageSource | None:
    """The first stage that a user names, if any."""
    return None if config.ckpt is None else FirstStageSource(Path(config.ckpt)).changed(config)


def is_first_stage_folder(path: Path) -> bool:
    """Whether the path is a first-stage folder of this package."""
    return has_config(path) and card_kind(path / "config.yaml") == FirstStageCard.KIND


def is_of_diffusers(source: Source) -> bool:
    """Whether a file is the weights in the folder of diffusers' VQModel or AutoencoderKL.

    Raises:
        UserError: the names are theirs, and the config.json that describes them is not beside the file.
    """
    if source.is_folder or not has_their_names(source.tensors):
        return False
    config = source.path.parent / "config.json"
    if not config.is_file() or read_json(config).get("_class_name") not in CLASSES:
        raise UserError(f"{source.path}: {ALONE}")
    return True


def has_their_names(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors have diffusers' names of a first stage."""
    return any(name.startswith("encoder.down_blocks.") for name in tensors)


def component_of(source: Source) -> Path:
    """The folder of diffusers' VQModel or AutoencoderKL: the source itself, or a part of a pipeline.

    Raises:
        UserError: there is neither.
    """
    if source.holds("config.json") and source.json("config.json").get("_class_name") in CLASSES:
        return source.path
    parts = source.json("model_index.json") if source.holds("model_index.json") else {}
    part = first_stage_part(parts)
    if part is None:
        kind = card_kind(source.path / "config.yaml") if has_config(source.path) else None
        found = f"is {kind}, not {FirstStageCard.KIND}" if kind else "holds no first stage"
        raise UserError(f"first_stage: {source.path} {found}; name the first stage's file or folder")
    return source.path / part


def tensors_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first stage in a file, under its own names, without its training loss and its EMA."""
    prefix = next(iter(prefixes_of(tensors, FIRST_STAGE)), "")
    found = unwrapped(under(tensors, PREFIX) or under(tensors, prefix))
    return {name: tensor for name, tensor in found.items() if not name.startswith(("loss.", "model_ema."))}


def infer_first_stage(tensors: Mapping[str, Tensor], latent_size: int, source: Path) -> tuple[str, dict[str, Any]]:
    """Target and parameters of a VQModel or AutoencoderKL, from its tensors and the side of its latents.

    Args:
        tensors: the first stage's, without a prefix.
        latent_size: side of the latents; tensor shapes do not show it.
        source: for messages.

    Raises:
        UserError: no first stage, or incomplete tensors.
    """
    if "encoder.conv_in.weight" not in tensors or "quant_conv.weight" not in tensors:
        raise UserError(f"{source}: holds no first stage; {HOW_TO_NAME}")
    try:
        return _inferred(tensors, latent_size)
    except TOO_FEW as error:
        raise UserError(f"{source}: its first stage is incomplete or of another kind ({error})") from error


def _inferred(tensors: Mapping[str, Tensor], latent_size: int) -> tuple[str, dict[str, Any]]:
    channels = tensors["encoder.conv_in.weight"].shape[0]
    levels, blocks = count_blocks(tensors, "encoder.down"), count_blocks(tensors, "encoder.down.0.block")
    resolution = latent_size * 2 ** (levels - 1)
    codes = tensors.get("quantize.embedding.weight")
    moments = tensors["encoder.conv_out.weight"].shape[0] // tensors["decoder.conv_in.weight"].shape[1]
    if moments != (2 if codes is None else 1):  # mean and log variance, or a latent that is quantised
        raise KeyError("quantize.embedding.weight")
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    if any(width % channels for width in widths):
        raise ValueError(f"channels {widths} are not multiples of the first convolution's {channels}")
    pooling = {} if levels == 1 or "encoder.down.0.downsample.conv.weight" in tensors else {"resamp_with_conv": False}
    ddconfig = {
        "double_z": codes is None,
        "z_channels": tensors["encoder.conv_out.weight"].shape[0] // moments,
        "resolution": resolution,
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_ch": tensors["decoder.conv_out.weight"].shape[0],
        "ch": channels,
        "ch_mult": multiples(widths, channels),
        "num_res_blocks": blocks,
        "attn_resolutions": [
            resolution // 2**level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in tensors
        ],
        "dropout": 0.0,
        **pooling,
    }
    if not any(".attn" in name for name in tensors):
        ddconfig["attn_type"] = "none"
    params = {"ddconfig": ddconfig, "embed_dim": tensors["quant_conv.weight"].shape[0] // moments}
    if codes is None:
        return "ldm_dkdm.first_stage.AutoencoderKL", params
    return "ldm_dkdm.first_stage.VQModel", {**params, "n_embed": codes.shape[0]}
