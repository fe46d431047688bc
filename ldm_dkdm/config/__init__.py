"""Configurations: files, recipes, and the sections in them, which check themselves."""

from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.schema import *  # noqa: F403
from ldm_dkdm.config.schema import __all__ as _schema

__all__ = ["load_config", *_schema]
