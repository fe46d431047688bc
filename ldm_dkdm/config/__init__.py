"""Configurations: files, recipes, and their sections, which check themselves."""

from ldm_dkdm.config import schema
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.schema import *  # noqa: F403

__all__ = ["load_config"]
__all__ += schema.__all__
