"""The sections of trainings on images and of sampling, and what each key may hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ldm_dkdm.config.checked import Section, key, one_of
from ldm_dkdm.config.sections import SAMPLERS
from ldm_dkdm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training images, and an optional held-out set."""

    path: str = key(path=True, help="Folder of images or ADM-style .npz.")
    image_size: int = key(min=1, max=8192, help="Side of the images in pixels, after cropping and scaling.")
    batch_size: int = key(min=1, help="Images in a training batch, per device.")
    held_out: str | None = key(None, path=True, help="Images that measure reconstruction: a folder or an .npz.")
    flip: bool = key(True, help="Mirror half of the images at random.")


@dataclass(frozen=True, kw_only=True)
class DiffusionDataConfig(Section):
    """Data-based: `path`; data-free: `synthetic`; data-limited: both, with a `fraction` of `path` (Sec. 4.1)."""

    path: str | None = key(None, path=True, help="Real images: a folder (sub-folders are classes) or an .npz.")
    fraction: float = key(1.0, above=0, max=1, help="Share of the images in `path` that is used, chosen by the seed.")
    synthetic: str | None = key(None, path=True, help="Samples of a teacher: an .npz of `--npz`.")
    mix: Literal["append", "replace"] = key(
        "append",
        help="Where there are both: add real images to the samples, or replace a `fraction` of the samples (the public "
        "code).",
    )
    image_size: int = key(min=1, max=8192, help="Side of the images in pixels, after cropping and scaling.")
    batch_size: int = key(min=1, help="Images in a training batch, per device.")
    global_batch_size: int | None = key(
        None, min=1, help="Images per step on all devices, which divide it, in place of `batch_size`."
    )
    classes: Sequence[str] = key(
        (), help="Names of the classes in the order of their labels, for the card; default: those of the sub-folders."
    )
    flip: bool = key(True, help="Mirror half of the images at random.")
    cache: bool = key(True, help="Encode all images once before the training; false encodes them in every step.")
    t_cap: float | None = key(
        None,
        above=0,
        help="Draws fewer t near pure noise: density min(1, t_cap * abar_t), 0.1 at least; null is uniform.",
    )

    def require_mixture(self) -> None:
        """Refuse to replace samples where there is one set; a recipe's `mix` waits for the second.

        Raises:
            UserError: `mix` has no effect.
        """
        if self.mix == "replace" and None in (self.path, self.synthetic):
            raise UserError(
                "data.mix: replace needs real images and samples; set data.path and data.synthetic, or leave it out"
            )


@dataclass(frozen=True)
class FirstStageLoss(Section):
    """Weights of the first stage's loss; 0 switches a term off."""

    l1: float = key(1.0, min=0, help="Weight of the mean absolute error.")
    l2: float = key(1.0, min=0, help="Weight of the mean squared error.")
    color: float = key(0.0, min=0, help="Weight of the absolute error between averages of 8x8 pixels.")
    codebook: float = key(1.0, min=0, help="Weight of the codebook's loss.")
    adversarial: float = key(0.0, min=0, help="Weight of the discriminator's loss.")
    adversarial_start: int = key(0, min=0, help="Step at which the discriminator's loss begins.")
    perceptual: float = key(0.0, min=0, help="Weight of the perceptual loss (LPIPS).")
    perceptual_backbone: str | None = key(None, path=True, help="File with torchvision's VGG16 weights, for LPIPS.")


@dataclass(frozen=True)
class CodebookConfig(Section):
    """How the codebook is initialised and kept in use."""

    continuous_steps: int = key(500, min=1, help="First steps, in which latents are not quantised.")
    restart_every: int = key(100, min=1, help="Steps between replacements of the entries that are not used.")


@dataclass(frozen=True)
class SamplingConfig(Section):
    """How images are sampled from a model."""

    count: int = key(64, min=1, max=100_000_000, help="Number of images.")
    batch_size: int = key(64, min=1, max=100_000, help="Images in one network call.")
    seed: int = key(0, min=0, help="Seed of the first image; image i has seed + i.")
    steps: int | None = key(None, min=1, help="Sampling steps; null takes the sampler's default.")
    eta: float = key(0.0, min=0, max=1, help="Share of DDPM's noise that DDIM adds in each step.")
    sampler: str = one_of(SAMPLERS, "ddim", help="How a step is taken.")
    labels: Sequence[int] = key((), min=0, help="Labels of a class-conditional model, repeated over the images.")
