"""Find the scale of a model's latents from its own samples, where no file states it beyond doubt."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_dkdm.first_stage.codec import LatentCodec

USUAL = (1.0, 0.18215, 0.13025)  # CompVis's VQ models, Stable Diffusion's VAE, SDXL's
GOOD = 0.05  # relative error of a right scale; without one below, the scale is searched
BAD = 0.3  # error that no right scale has: the samples or the first stage are of no use
CLEARLY = 0.5  # another scale must have less than this share of the own one's error
SEARCH = 4  # steps of the search, whose error falls about tenfold in each
IMAGES = 2  # samples that decide


@dataclass(frozen=True)
class ScaleFigures:
    """Scale -> relative error ||E(D(z)) - z||^2 / ||z||^2 of samples z that are decoded and encoded again.

    A model's samples are `scale` times what its encoder gives, so that decoding and encoding returns them at the right
    scale alone.
    """

    own: float
    errors: Mapping[str, float]

    @property
    def best(self) -> float:
        """The scale to take: the own one unless another returns samples and is clearly better."""
        other = min(self.errors, key=lambda scale: self.errors[scale])
        found, own = self.errors[other], self.errors[f"{self.own:.5g}"]
        return float(other) if found < min(CLEARLY * own, BAD) else self.own

    def __str__(self) -> str:
        shown = ", ".join(f"{scale}: {error:.3g}" for scale, error in sorted(self.errors.items(), key=lambda i: i[1]))
        return f"relative error of samples after decoding and encoding: {shown}"


def scale_figures(codec: LatentCodec, states: Tensor) -> ScaleFigures:
    """Compare the codec's own scale with usual ones, and with a searched one where none fits.

    Args:
        codec: its scale is not changed. states: samples (B,C,h,w) of the model; the first few are used.
    """
    states = states[:IMAGES]
    errors = {f"{scale:.5g}": _error(codec, states, scale) for scale in (codec.scale_factor, *USUAL)}
    if min(errors.values()) > GOOD:
        scale = float(min(errors, key=lambda name: errors[name]))
        for _ in range(SEARCH):  # the encoder's own spread, at a scale that is nearly right
            scale = (states.std() / (_round_trip(codec, states, scale) / scale).std()).item()
        name = f"{scale:.3g}"
        errors[name] = _error(codec, states, float(name))
    return ScaleFigures(codec.scale_factor, errors)


def _round_trip(codec: LatentCodec, states: Tensor, scale: float) -> Tensor:
    trial = copy.copy(codec)
    trial.scale_factor = scale
    return trial.encode(trial.decode(states)).to(states)


@torch.no_grad()
def _error(codec: LatentCodec, states: Tensor, scale: float) -> float:
    error = (_round_trip(codec, states, scale) - states).square().mean() / states.square().mean()
    return error.nan_to_num(nan=torch.inf).item()
