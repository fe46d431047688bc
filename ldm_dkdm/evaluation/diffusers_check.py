"""Compare a diffusers folder with the model that it was written from, using diffusers."""

from dataclasses import replace
from pathlib import Path

import torch

from ldm_dkdm.diffusion.samplers import ddim, last
from ldm_dkdm.first_stage import vq
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.model import DiffusionModel

STEPS = 10


@torch.no_grad()
def largest_difference(folder: Path, model: DiffusionModel) -> float | None:
    """Largest difference from diffusers in two samples' states by DDIM-10, and in what is decoded from them.

    In units of the largest value if that is above 1: states of a barely trained network have no bound. None without
    diffusers.
    """
    try:
        from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
    except ImportError:
        return None
    noise = torch.randn(
        (2, *model.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    classes, model = model.classes, model.changed(guidance=1.0, precision="32")
    label = None if classes is None else torch.tensor([classes[0], classes[-1]], device="cpu")
    steps = min(STEPS, model.schedule.num_timesteps)
    # the library's DDIM agrees with its own timesteps for this spacing only
    model = model.changed(diffusion=replace(model.diffusion, timestep_spacing="leading"))
    ours = last(ddim(model.schedule, model.predict, noise, lambda: noise, steps, label))
    kind, part = (UNet2DModel, "unet") if (folder / "unet").is_dir() else (DiTTransformer2DModel, "transformer")
    network = kind.from_pretrained(folder / part, low_cpu_mem_usage=False).eval()
    own = model.schedule
    scheduler = DDIMScheduler.from_pretrained(
        folder,
        subfolder="scheduler",
        set_alpha_to_one=own.set_alpha_to_one,
        steps_offset=own.steps_offset,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)), class_labels=label).sample[:, : x.shape[1]]
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    difference = _relative(x, ours)
    codec = model.codec()
    return max(difference, _decoded(folder, codec, ours)) if isinstance(codec, LatentCodec) else difference


def _decoded(folder: Path, codec: LatentCodec, states: torch.Tensor) -> float:
    """Largest difference of what both first stages decode from states (B,C,h,w)."""
    from diffusers import AutoencoderKL, VQModel

    own = codec.autoencoder
    kind = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[type(own).__name__]
    part = next(folder / name for name in ("vqvae", "vae") if (folder / name).is_dir())
    theirs = kind.from_pretrained(part, low_cpu_mem_usage=False).eval()
    z = states / codec.scale_factor
    if isinstance(own, vq.VQModel):  # rounding decides the code of a latent between two codes
        z = own.quantise(z)[0]
    decoded = theirs.decode(z * codec.scale_factor / theirs.config.scaling_factor).sample
    return _relative(decoded, own.decode(z))


def _relative(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    return ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1)).item()
