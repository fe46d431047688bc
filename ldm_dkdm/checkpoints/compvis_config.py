"""Read the config that CompVis's code keeps beside a checkpoint: what the checkpoint's tensors do not show."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldm_dkdm.checkpoints.config_files import configs_beside, model_section
from ldm_dkdm.checkpoints.contents import check_schedule, schedule_of
from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.registry import IGNORED
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.errors import UserError, nearest
from ldm_dkdm.networks import UNet
from ldm_dkdm.reporting import logger

OUR_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # CompVis's names -> ours
ROOTS = "sqrt"  # CompVis's name of the square roots of linear betas, which have no name here
COSINE_S = 8e-3  # CompVis's default `cosine_s`, the only one that has a name here
MOST_STEPS = 1_000_000
DEFAULTS = {
    "beta_schedule": "linear",
    "timesteps": 1000,
    "linear_start": 1e-4,
    "linear_end": 2e-2,
}  # the defaults of CompVis's DDPM class
MOST_HEADS = 4096
SCHEDULE_KEYS = (*DEFAULTS, "cosine_s", "given_betas")
# further keys of CompVis's UNetModel, and the values at which it is the one here; no value: any
UNET_KEYS: dict[str, tuple[Any, ...]] = {
    **{key: IGNORED[key] for key in ("dims", "use_fp16", "use_spatial_transformer", "legacy")},
    "n_embed": (None,),
    "context_dim": (None,),
    "transformer_depth": (),
    "spatial_transformer_attn_type": (),
    "use_linear_in_transformer": (),
    **dict.fromkeys(("adm_in_channels", "num_attention_blocks"), (None,)),
    **dict.fromkeys(("disable_self_attentions", "disable_middle_self_attn"), (None, False)),
}
PIXEL_CLASSES = ("ddpm.DDPM",)  # ends of targets whose states are images
IDENTITY = "IdentityFirstStage"
VARIANCES = {0.0: None, 1.0: "beta"}  # `v_posterior` -> ours
UNSHOWN = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "dropout", "use_checkpoint")


@dataclass(frozen=True)
class CompVisConfig:
    """The `model` section of CompVis's YAML.

    Attributes:
        file: where it was read.
        model: `model.params`. unet: `model.params.unet_config.params`.
        target: `model.target`, empty where there is none.
    """

    file: Path
    model: Mapping[str, Any]
    unet: Mapping[str, Any]
    target: str = ""

    def differences(self, shown: Mapping[str, Any]) -> list[str]:
        """Where the UNet of the config is not the one that tensors show, as `key: value, not value`."""
        return [
            f"{key}: {plain(self.unet[key])}, not {plain(value)}"
            for key, value in shown.items()
            if key in self.unet and key != "num_classes" and not _same(key, self.unet[key], value)
        ]

    @property
    def usual(self) -> dict[str, Any]:
        """The UNet's parameters that no tensor shows, as the config gives them; -1 stands for not given.

        The side of the states is the model's: CompVis's UNet does not look at its own `image_size`.
        """
        given = {**self.unet, **({"image_size": self.model["image_size"]} if self.model.get("image_size") else {})}
        found = {key: given[key] for key in UNSHOWN if given.get(key, -1) not in (-1, None)}
        if "num_head_channels" in found:  # CompVis's code does not look at num_heads then
            heads = convert(int, found.pop("num_heads", -1), f"{self.file}: num_heads")
            if not -1 <= heads <= MOST_HEADS:
                raise UserError(f"{self.file}: num_heads: {heads} is not between -1 and {MOST_HEADS}")
        return found

    @property
    def parameterization(self) -> str | None:
        """What the network predicts.

        Raises:
            UserError: anything but a text.
        """
        value = self.model.get("parameterization")
        return None if value is None else convert(str, value, f"{self.file}: parameterization")

    @property
    def scale_factor(self) -> float | None:
        """The factor of the latents; None where it was measured on the data (`scale_by_std`).

        Raises:
            UserError: anything but a number.
        """
        value = None if self.model.get("scale_by_std") else self.model.get("scale_factor")
        return None if value is None else convert(float, value, f"{self.file}: scale_factor")

    @property
    def use_ema(self) -> bool | None:
        """Which weights CompVis's code samples with; None where the config does not say.

        Raises:
            UserError: neither true nor false.
        """
        return convert(bool | None, self.model.get("use_ema"), f"{self.file}: use_ema")

    def require_supported(self) -> None:
        """Refuse a UNet that is not the one here, though its tensors may be.

        Raises:
            UserError: names the key.
        """
        known = {*inspect.signature(UNet).parameters, *UNET_KEYS, "num_heads_upsample"}
        for key, value in self.unet.items():
            where = f"{self.file}: model.params.unet_config.params.{key}"
            if key not in known:
                raise UserError(f"{where}: not a key of CompVis's UNetModel{nearest(key, known) or '; remove it'}")
            allowed = UNET_KEYS.get(key, ())
            if allowed and value not in allowed:
                raise UserError(f"{where}: {value!r} is not supported, only {allowed[0]!r}")
        upsample, by_width = (
            self.unet.get("num_heads_upsample"),
            self.unet.get("num_head_channels", -1) not in (-1, None),
        )
        if not by_width and upsample not in (None, -1, self.unet.get("num_heads")):
            raise UserError(
                f"{self.file}: model.params.unet_config.params.num_heads_upsample: {upsample!r} is not supported, "
                "only -1 or num_heads"
            )

    @property
    def space(self) -> str:
        """`pixel` for classes whose states are images."""
        stage = self.model.get("first_stage_config")
        identity = isinstance(stage, Mapping) and str(stage.get("target", "")).endswith(IDENTITY)
        return "pixel" if identity or self.target.endswith(PIXEL_CLASSES) else "latent"

    def sampling(self) -> dict[str, Any]:
        """Keys of `DiffusionConfig` by which CompVis's code samples in another way than is usual in the space.

        Raises:
            UserError: a variance between the two that are known.
        """
        value = convert(float, self.model.get("v_posterior", 0.0), f"{self.file}: v_posterior")
        if value not in VARIANCES:
            raise UserError(f"{self.file}: v_posterior: {value:g} is not supported, only 0 and 1")
        found: dict[str, Any] = {"space": self.space, "variance": VARIANCES[value]}
        if self.space == "pixel":  # a LatentDiffusion of images does not clip
            own = self.target.endswith(PIXEL_CLASSES)
            if not own and (self.model.get("scale_by_std") or self.scale_factor not in (None, 1)):
                raise UserError(f"{self.file}: scale_factor: images of an {IDENTITY} are not scaled here; only 1 works")
            clips = own and convert(bool, self.model.get("clip_denoised", True), f"{self.file}: clip_denoised")
            found |= {"clip_sample": None if clips else False, "steps_offset": None if own else 1}
        return found

    def diffusion(self) -> DiffusionConfig | None:
        """The forward process; None for a schedule that is not known.

        Raises:
            UserError: numbers that make no schedule.
        """
        keys: dict[str, Any] = {**DEFAULTS, **{key: self.model[key] for key in DEFAULTS if key in self.model}}
        name = convert(str, keys["beta_schedule"], f"{self.file}: beta_schedule")
        start, end, steps = keys["linear_start"], keys["linear_end"], keys["timesteps"]
        shift = convert(float, self.model.get("cosine_s", COSINE_S), f"{self.file}: cosine_s")
        if self.model.get("given_betas") is not None:
            keys = {"betas": self.model["given_betas"]}
        elif name == ROOTS:
            first, final = (convert(float, value, f"{self.file}: linear_start, linear_end") for value in (start, end))
            keys = {"num_timesteps": self._steps, "betas": (np.linspace(first, final, self._steps) ** 0.5).tolist()}
        elif name == "cosine" and shift != COSINE_S:
            keys = {"num_timesteps": self._steps, "betas": cosine_betas(self._steps, shift)}
        elif name in OUR_SCHEDULES:
            keys = {"schedule": OUR_SCHEDULES[name], "num_timesteps": steps, "beta_start": start, "beta_end": end}
        else:
            return None
        try:
            return DiffusionConfig(**keys, **self.sampling())
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error

    @property
    def _steps(self) -> int:
        steps = convert(int, self.model.get("timesteps", DEFAULTS["timesteps"]), f"{self.file}: timesteps")
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"{self.file}: timesteps: {steps} is not between 1 and {MOST_STEPS:,}")
        return steps

    @property
    def unknown_schedule(self) -> str:
        """What is not known of the schedule, for a message."""
        known = ", ".join((*OUR_SCHEDULES, ROOTS))
        return f"{self.file}: beta_schedule: {self.model.get('beta_schedule')!r} is not one of {known}"

    def require_stored(self, stored: Tensor, ends_in_noise: bool, checkpoint: Path) -> None:
        """Refuse a schedule that is not the checkpoint's `alphas_cumprod` (T,); a config may also give none.

        Raises:
            UserError: names both files.
        """
        given = [key for key in SCHEDULE_KEYS if self.model.get(key) is not None]
        keys = f"{', '.join(given)} in {self.file.name}, or move that file away"
        if "timesteps" in given and self._steps != len(stored):
            raise UserError(
                f"{self.file}: timesteps: {self._steps}, but {checkpoint} was trained with {len(stored)}; correct "
                f"{keys}"
            )
        process = self.diffusion() if set(given) - {"timesteps"} else None
        if process is not None:
            schedule = schedule_of(replace(process, rescale_betas_zero_snr=ends_in_noise))
            check_schedule(stored, schedule, checkpoint, where=str(self.file), keys=keys)


def cosine_betas(num_timesteps: int, shift: float) -> list[float]:
    """Betas of the cosine schedule with another offset than 0.008 (Nichol & Dhariwal 2021, Eq. 17), at most 0.999."""
    angles = (np.arange(num_timesteps + 1) / num_timesteps + shift) / (1 + shift) * math.pi / 2
    abar = np.cos(angles) ** 2
    return np.clip(1 - abar[1:] / abar[:-1], 0, 0.999).tolist()


def config_beside(checkpoint: Path, shown: Mapping[str, Any]) -> CompVisConfig | None:
    """The config of a checkpoint, if one lies where CompVis's code or `dkdm convert` puts it and fits its tensors.

    NAME.yaml beside NAME.ckpt, config.yaml in its folder, configs/*-project.yaml in the folder above.

    Args:
        checkpoint: the file.
        shown: parameters of the UNet that its tensors show; another network's config is named and not used.
    """
    for file in configs_beside(checkpoint):
        found = _read(file)
        if found is None:
            continue
        if different := found.differences(shown):
            logger.warning(f"{file}: describes another network than {checkpoint.name} ({different[0]}); not used")
            continue
        found.require_supported()
        logger.info(f"{file}: read for what the tensors of {checkpoint.name} do not show")
        return found
    return None


def _read(file: Path) -> CompVisConfig | None:
    """CompVis's config in a YAML file; None for any other file, which is not this model's to judge."""
    section = model_section(file)
    try:
        model = section["params"]
        unet = model["unet_config"]["params"]
    except (KeyError, TypeError):
        return None
    target = section.get("target")
    known = isinstance(unet, Mapping) and isinstance(model, Mapping)
    return CompVisConfig(file, model, unet, target if isinstance(target, str) else "") if known else None


def _same(key: str, configured: Any, shown: Any) -> bool:
    """Whether two values are equal; the order of attention_resolutions has no meaning."""
    if key == "attention_resolutions" and isinstance(configured, (list, tuple)):
        return sorted(map(str, configured)) == sorted(map(str, shown))
    return bool(plain(configured) == plain(shown))
