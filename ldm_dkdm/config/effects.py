"""Refuse keys of a configuration, or hints, that another key or hint leaves without effect."""

from collections.abc import Callable, Mapping
from typing import Any

from ldm_dkdm.config.process_section import DiffusionConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import logger

NETWORKS = ("teacher", "student", "model")  # sections with the parameters of a network


def idle_keys(config: DiffusionConfig) -> dict[str, str]:
    """The keys of a process that change nothing, whatever their values, and why."""
    found: dict[str, str] = {}
    if config.betas is not None:
        found |= dict.fromkeys(("schedule", "beta_start", "beta_end"), "beside betas")
    elif config.schedule == "cosine":
        found |= dict.fromkeys(("beta_start", "beta_end"), "with schedule: cosine")
    if config.thresholding:
        found["clip_sample_range"] = "with thresholding: true"
        if config.clip_sample:  # false says the same
            found["clip_sample"] = "with thresholding: true"
        return found
    found |= dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), "without thresholding: true")
    if not (config.space == "pixel" if config.clip_sample is None else config.clip_sample):
        found["clip_sample_range"] = "without clip_sample: true"
    return found


def require_effect(given: Mapping[str, Any], config: DiffusionConfig, key: Callable[[str], str], drop: str) -> None:
    """Refuse keys that the user gives and that another one leaves without effect.

    Args:
        given: what the user gives of the process; None is not given.
        config: the whole process.
        key: how the user writes a key. drop: the advice to do without it.

    Raises:
        UserError: names the key and what stands in its way.
    """
    idle = idle_keys(config)
    for name, value in given.items():
        if name == "num_timesteps" and config.betas is not None and value not in (None, len(config.betas)):
            raise UserError(f"{key(name)}: {value} is not the number of betas, which is {len(config.betas)}; {drop}")
        if value is not None and name in idle:
            raise UserError(f"{key(name)}: has no effect {idle[name]}; {drop}")


def require_effects(tree: Mapping[str, Any], config: Any) -> None:
    """The same for the sections of a run's configuration; what equals its default may come from a run's folder.

    Of the parameters of a network, which may be pasted from another code, a warning names those without effect.

    Args:
        tree: the sections as they are given.
        config: the configuration that they mean.

    Raises:
        UserError: names the key and what stands in its way.
    """
    process: DiffusionConfig | None = getattr(config, "diffusion", None)
    if process is not None:
        usual = {**vars(DiffusionConfig(process.schedule, process.num_timesteps)), "num_timesteps": None}
        usual["schedule"] = DiffusionConfig.schedule
        given = {name: value for name, value in tree["diffusion"].items() if value != usual.get(name)}
        require_effect(given, process, "diffusion.{}".format, "remove it or set it to null")
    for section in NETWORKS:
        params = getattr(getattr(config, section, None), "params", None) or {}
        if heads_without_effect(params):
            logger.warning(f"{section}.params.num_heads: has no effect beside num_head_channels; remove one of them")


def heads_without_effect(params: Mapping[str, Any]) -> bool:
    """Whether a UNet's parameters have a number of heads that `num_head_channels` replaces."""
    return params.get("num_heads") not in (None, -1, 1) and params.get("num_head_channels") not in (None, -1)
