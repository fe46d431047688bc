"""The diffusion model, and the functions that open one from any format."""

from ldm_dkdm.model.diffusion_model import DiffusionModel
from ldm_dkdm.model.opening import load_model, open_model
from ldm_dkdm.model.sampling import SampleBatch, require_sampling

__all__ = ["DiffusionModel", "SampleBatch", "load_model", "open_model", "require_sampling"]
