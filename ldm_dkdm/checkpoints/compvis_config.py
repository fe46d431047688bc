"""Read the config that CompVis's code keeps beside a checkpoint: what the checkpoint's tensors do not show."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.load import read_yaml
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import logger

OUR_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # CompVis's names -> ours
DEFAULTS = {
    "beta_schedule": "linear",
    "timesteps": 1000,
    "linear_start": 1e-4,
    "linear_end": 2e-2,
}  # the defaults of CompVis's DDPM class
MOST_HEADS = 4096
UNSHOWN = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "dropout", "use_checkpoint")


@dataclass(frozen=True)
class CompVisConfig:
    """The `model` section of CompVis's YAML.

    Attributes:
        file: where it was read.
        model: `model.params`. unet: `model.params.unet_config.params`.
    """

    file: Path
    model: Mapping[str, Any]
    unet: Mapping[str, Any]

    def differences(self, shown: Mapping[str, Any]) -> list[str]:
        """Where the UNet of the config is not the one that tensors show, as `key: value, not value`."""
        return [
            f"{key}: {_plain(self.unet[key])}, not {_plain(value)}"
            for key, value in shown.items()
            if key in self.unet and key != "num_classes" and not _same(key, self.unet[key], value)
        ]

    @property
    def usual(self) -> dict[str, Any]:
        """The UNet's parameters that no tensor shows, as the config gives them; -1 stands for not given."""
        found = {key: self.unet[key] for key in UNSHOWN if self.unet.get(key, -1) not in (-1, None)}
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

    def diffusion(self) -> DiffusionConfig | None:
        """The forward process, for a file without its buffers; None for a schedule that is not known.

        Raises:
            UserError: numbers that make no schedule.
        """
        keys: dict[str, Any] = {**DEFAULTS, **{key: self.model[key] for key in DEFAULTS if key in self.model}}
        if self.model.get("given_betas") is not None:
            keys = {"betas": self.model["given_betas"]}
        elif convert(str, keys["beta_schedule"], f"{self.file}: beta_schedule") in OUR_SCHEDULES:
            ends = {"beta_start": keys["linear_start"], "beta_end": keys["linear_end"]}
            keys = {"schedule": OUR_SCHEDULES[keys["beta_schedule"]], "num_timesteps": keys["timesteps"], **ends}
        else:
            return None
        try:
            return DiffusionConfig(**keys)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from error


def config_beside(checkpoint: Path, shown: Mapping[str, Any]) -> CompVisConfig | None:
    """The config of a checkpoint, if one lies where CompVis's code or `dkdm convert` puts it and fits its tensors.

    NAME.yaml beside NAME.ckpt, config.yaml in its folder, configs/*-project.yaml in the folder above.

    Args:
        checkpoint: the file.
        shown: parameters of the UNet that its tensors show; another network's config is named and not used.
    """
    for file in _candidates(checkpoint):
        found = _read(file)
        if found is None:
            continue
        if different := found.differences(shown):
            logger.warning(f"{file}: describes another network than {checkpoint.name} ({different[0]}); not used")
            continue
        logger.info(f"{file}: read for what the tensors of {checkpoint.name} do not show")
        return found
    return None


def _candidates(checkpoint: Path) -> Iterator[Path]:
    folder = checkpoint.parent
    named = [checkpoint.with_suffix(suffix) for suffix in (".yaml", ".yml")]
    projects = sorted((folder.parent / "configs").glob("*-project.yaml"), reverse=True)  # the newest first
    return (file for file in (*named, folder / "config.yaml", *projects) if file.is_file())


def _read(file: Path) -> CompVisConfig | None:
    """CompVis's config in a YAML file; None for any other file, which is not this model's to judge."""
    try:
        tree: Any = OmegaConf.to_container(read_yaml(file, {}))
        model = tree["model"]["params"]
        unet = model["unet_config"]["params"]
    except UserError as error:
        logger.warning(f"{error}; not used")
        return None
    except (OmegaConfBaseException, OSError, KeyError, TypeError):
        return None
    return CompVisConfig(file, model, unet) if isinstance(unet, Mapping) and isinstance(model, Mapping) else None


def _same(key: str, configured: Any, shown: Any) -> bool:
    """Whether two values are equal; the order of attention_resolutions has no meaning."""
    if key == "attention_resolutions" and isinstance(configured, (list, tuple)):
        return sorted(map(str, configured)) == sorted(map(str, shown))
    return bool(_plain(configured) == _plain(shown))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
