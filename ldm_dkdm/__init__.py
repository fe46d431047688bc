"""ldm_dkdm: data-free knowledge distillation of diffusion models (DKDM, CVPR 2025)."""

from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.registry import build
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.pool import NoisyPool
from ldm_dkdm.errors import UserError
from ldm_dkdm.teacher import Teacher

__all__ = ["NoiseSchedule", "NoisyPool", "Teacher", "UserError", "build", "load_config"]
