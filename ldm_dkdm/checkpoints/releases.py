"""Where to get the checkpoints that the recipes expect."""

from pathlib import Path

from ldm_dkdm.config.hub import cache_folder, is_hub_id

RELEASES = {
    "ffhq256": "CompVis's LDM-VQ-4 release for FFHQ (ffhq.zip), unpack its model.ckpt",
    "celebahq256": "CompVis's LDM-VQ-4 release for CelebA-HQ (celeba.zip), unpack its model.ckpt",
    "cifar10": "DDPM-IP's release ADM_cifar10_baseline.pt",
    "celeba64": "DDPM-IP's release DDPM_IP_celeba64.pt",
    "imagenet32": "DDPM-IP's release DDPM_IP_imageNet32.pt",
}  # checkpoint's folder -> release


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
