"""The only readers and writers of checkpoint files."""

from ldm_dkdm.checkpoints.reading import read_tensors

__all__ = ["read_tensors"]
