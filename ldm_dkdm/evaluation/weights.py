"""Weights of feature extractors: found in local files, named by hash, never downloaded."""

from dataclasses import dataclass
from pathlib import Path

from ldm_dkdm.checkpoints.card import sha256
from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import in_home, size

INSTALL = "pip install 'ldm-dkdm[evaluation]'"


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights.

    Attributes:
        name: its name in the cache of torch.hub.
        sha256: its hash, hexadecimal.
        size: in bytes.
        origin: where it is published.
    """

    name: str
    sha256: str
    size: int
    origin: str

    def __str__(self) -> str:
        """Name, size and hash."""
        return f"{self.name} ({size(self.size)}, SHA-256 {self.sha256})"


VGG16 = WeightsFile(  # the backbone of LPIPS
    "vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    553_433_881,
    "https://download.pytorch.org/models/vgg16-397923af.pth",
)


def cache_folder() -> Path:
    """The folder where torch.hub, and so torch-fidelity and torchvision, keep downloaded weights."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(file: WeightsFile) -> Path:
    """The file in the cache of torch.hub.

    Raises:
        UserError: it is not there; name, size, hash and place. Or it is another file of that name.
    """
    path = cache_folder() / file.name
    if not path.is_file():
        raise UserError(
            f"features: {file.name} is missing ({size(file.size)}, SHA-256 {file.sha256}); get it from {file.origin}, "
            f"put it at {in_home(path)}, or give its path (nothing is downloaded); without it, efficientnet-lite0 works"
        )
    if (found := sha256(path)) != file.sha256:
        raise UserError(f"features: {path} is damaged or another file: its SHA-256 is {found}, not {file.sha256}")
    return path
