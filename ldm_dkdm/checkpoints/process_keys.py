"""Which keys of a process are its sampling's, and which ones hints leave as they are stored."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ldm_dkdm.config.schema import DiffusionConfig

SAMPLING = (
    "variance",
    "steps_offset",
    "timestep_spacing",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)  # keys of the process that are None where the model decides


def own_sampling(config: DiffusionConfig) -> list[str]:
    """The keys by which a process is sampled in another way than is usual in its space."""
    usual = DiffusionConfig(space=config.space)
    keys = (*SAMPLING, "rescale_betas_zero_snr", "rescale_timesteps")
    return [key for key in keys if getattr(config, key) != getattr(usual, key)]


def kept_beside(stored: DiffusionConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The stored values that a partial hint keeps; another schedule brings its own betas and ends."""
    tree = asdict(stored)
    if {"schedule", "betas"} & set(given):
        tree.pop("betas", None)
    if given.get("schedule", stored.schedule) != stored.schedule:
        del tree["beta_start"], tree["beta_end"]
    return tree
