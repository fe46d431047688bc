"""Where to get the checkpoints that the recipes expect."""

import re
from pathlib import Path

from ldm_dkdm.config.hub import cache_folder, is_hub_id
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import exists

RELEASES = {
    "ffhq256": "CompVis's LDM-VQ-4 release for FFHQ (ffhq.zip), unpack its model.ckpt",
    "celebahq256": "CompVis's LDM-VQ-4 release for CelebA-HQ (celeba.zip), unpack its model.ckpt",
    "cifar10": "DDPM-IP's release ADM_cifar10_baseline.pt",
    "celeba64": "DDPM-IP's release DDPM_IP_celeba64.pt",
    "imagenet32": "DDPM-IP's release DDPM_IP_imageNet32.pt",
}  # checkpoint's folder -> release

ADDRESS = re.compile(r"(https?|ftp|s3|gs|hf):/+")  # a Path keeps one of the slashes
HUB = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([^/?#]+/[^/?#]+)")

MODEL = "name a CompVis .ckpt, a guided-diffusion .pt, a diffusers folder, or a model folder (config.yaml and weights)"

SHOWN = 4  # checkpoints that a message names, the newest


def how_to_get(path: Path, otherwise: str = MODEL) -> str:
    """Advice on a missing checkpoint; `otherwise` says what to name if it is not a known release or run."""
    release = RELEASES.get(path.parent.name)
    if release:
        return f"download {release} and put it there, or name another path"
    if path.parent.name == "checkpoints" and path.parent.is_dir():
        names = [file.name for file in sorted(path.parent.glob("*.ckpt"))][-SHOWN:]
        return f"{path.parent} holds {', '.join(names) or 'no checkpoint'}; name one of them, or {path.parent.parent}"
    run = next((place for place in path.parents[:-2] if (place / "config.yaml").is_file()), None)
    if path.parts[:1] == ("logs",) and run is not None:
        return f"name {run}, which exists, or another path"
    if path.parts[:1] == ("logs",):
        return "the run does not exist; make it with `dkdm distill` or `dkdm train`, or name another path"
    if is_hub_id(path):
        return f"if it is a Hub id, `hf download {path}` fetches it into {cache_folder()}; else name a file or folder"
    return otherwise


def refuse_address(path: str | Path) -> None:
    """Refuse an address of the network in place of a file; nothing is downloaded here.

    Raises:
        UserError: says how to download it.
    """
    found = ADDRESS.match(str(path))
    if found is None or exists(str(path)):
        return
    rest = str(path)[found.end() :]
    hub = HUB.match(rest)
    how = f"`hf download {hub[1]}`, then name {hub[1]}" if hub else "download it and name the file"
    raise UserError(f"{found[1]}://{rest}: is an address, and nothing is downloaded here; {how}")
