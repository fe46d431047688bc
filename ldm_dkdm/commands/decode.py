"""Latents in files to pictures in files."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_dkdm.assemble import load_codec
from ldm_dkdm.checkpoints import read_tensors
from ldm_dkdm.config.schema import FirstStageConfig
from ldm_dkdm.device import default_device, resolve_precision
from ldm_dkdm.errors import UserError
from ldm_dkdm.images import read_npz, save_grid, save_image, save_npz


def read_latents(path: Path) -> Tensor:
    """The one tensor (N,C,h,w) in an .npz (`arr_0`), .pt or .safetensors file."""
    if path.suffix == ".npz":
        latents = torch.from_numpy(read_npz(path))
    else:
        tensors = read_tensors(path)
        if len(tensors) != 1:
            raise UserError(f"{path}: expected one tensor, found {len(tensors)}: {', '.join([*tensors][:4])}")
        latents = next(iter(tensors.values()))
    if latents.dtype == torch.uint8:
        raise UserError(
            f"{path}: holds pictures already (uint8), not latents; --latents of txt-free_sample.py writes those"
        )
    if latents.ndim != 4 or len(latents) == 0:
        raise UserError(f"{path}: latents are (N,C,h,w), N > 0, found {tuple(latents.shape)}")
    return latents.float()


def decode_file(path: Path, first_stage: Path, out: Path, scale_factor: float | None, batch_size: int) -> int:
    """Decode a file of latents into `out`: grid.png, img/*.png, samples.npz; returns how many images."""
    latents = read_latents(path)
    device = default_device("auto")
    config = FirstStageConfig(scale_factor=scale_factor)
    codec = load_codec(first_stage, config, resolve_precision("auto", device)).to(device)
    if latents.shape[1] != codec.latent_channels:
        raise UserError(f"{path}: {latents.shape[1]} channels, but {first_stage} decodes {codec.latent_channels}")
    batches = tqdm(latents.split(batch_size), desc="decoding", unit="batch")
    images = torch.cat([codec.decode(batch.to(device)).cpu() for batch in batches])
    for i, image in enumerate(images):
        save_image(Image.fromarray(image.numpy()), out / "img" / f"{i:06d}.png")
    save_grid(images, out / "grid.png")
    save_npz(images, out / "samples.npz")
    return len(images)
