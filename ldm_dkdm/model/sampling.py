"""From seeds to images: noise -> sampler -> first stage -> batches of uint8 images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.device import resolve_precision
from ldm_dkdm.diffusion.samplers import SAMPLERS, ImageNoise, Sampler, last
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.first_stage.codec import Codec, LatentCodec
from ldm_dkdm.first_stage.scale import IMAGES, scale_figures
from ldm_dkdm.networks.modes import in_eval_mode
from ldm_dkdm.records import Prediction
from ldm_dkdm.reporting import logger
from ldm_dkdm.rng import numpy_generator

if TYPE_CHECKING:
    from ldm_dkdm.model.diffusion_model import DiffusionModel

OVERFLOW = "the weights are damaged, a training diverged, or they overflow in this precision"


@dataclass(frozen=True)
class SampleBatch:
    """Samples of a model: states x_0 (B,C,h,w), images uint8 (B,H,W,C) on the CPU, labels (B,) if any."""

    states: Tensor
    images: Tensor
    labels: Tensor | None


@dataclass
class CheckedCalls:
    """A model's `predict`, which notes whether eps (B,C,H,W) is finite; it does not wait for the device.

    Attributes:
        model: it predicts. name: of the model in messages.
        seen: timesteps (B,) of every call, and whether eps was finite there.
    """

    model: "DiffusionModel"
    name: str
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """The model's prediction."""
        found = self.model.predict(x, t, label)
        self.seen.append((t, found.eps.isfinite().flatten(1).all(1)))
        return found

    def require_finite(self, states: Tensor | None = None) -> None:
        """Refuse predictions of these calls, or states that they led to, which are not finite.

        Raises:
            UserError: names the model, and the largest timestep.
        """
        t, is_finite = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        if not is_finite.all():
            where = f"(t = {int(t[~is_finite].max())})"
            raise UserError(f"{self.name}: its predictions are not finite {where}; {OVERFLOW}")
        if states is not None and not states.isfinite().all():
            raise UserError(f"{self.name}: its samples are not finite; {OVERFLOW}")


def starts_of(config: SamplingConfig) -> range:
    """The number of the first image of every batch."""
    return range(0, config.count, config.batch_size)


def sample_batches(
    model: "DiffusionModel", config: SamplingConfig, starts: Sequence[int] | None = None
) -> Iterator[SampleBatch]:
    """Draw and decode batch by batch, so that the images need not fit in memory.

    Args:
        model: it samples.
        config: number, seed and sampler.
        starts: some of `starts_of(config)`, whose batches are drawn; default: all.

    Raises:
        UserError: as `DiffusionModel.sample`.
    """
    require_sampling(model, config)
    codec = model.codec().to(model.device, resolve_precision(model.precision, model.device))
    settle(model, config)
    with in_eval_mode(model.network):
        for start in starts_of(config) if starts is None else starts:
            count = min(config.batch_size, config.count - start)
            states, label = _drawn(model, config, start, count)
            yield SampleBatch(states, codec.decode(states).cpu(), label)


def _drawn(model: "DiffusionModel", config: SamplingConfig, start: int, count: int) -> tuple[Tensor, Tensor | None]:
    """States and labels of the images start ... start+count-1."""
    sampler, steps, device = require_sampling(model, config), steps_of(model, config), model.device
    noise = ImageNoise([config.seed + start + i for i in range(count)], model.shape, device)
    label = labels_of(model, config, start, count)
    label = None if label is None else label.to(device)
    calls = CheckedCalls(model, str(model.path or "model"))
    states = last(sampler.walk(model.schedule, calls, noise(), noise, steps, label, config.eta))
    calls.require_finite(states)
    return states, label


def settle(model: "DiffusionModel", config: SamplingConfig) -> None:
    """Decide a doubtful scale of the latents by the samples of seed and seed + 1, whatever the batches are."""
    codec = model.codec()
    if _doubtful(codec, model):
        codec.to(model.device, resolve_precision(model.precision, model.device))
        with in_eval_mode(model.network):
            settle_scale(model, codec, _drawn(model, config, 0, IMAGES)[0])


def _doubtful(codec: Codec, model: "DiffusionModel") -> TypeGuard[LatentCodec]:
    return isinstance(codec, LatentCodec) and bool(codec.doubt) and model.path is not None


def settle_scale(model: "DiffusionModel", codec: Codec, states: Tensor) -> None:
    """Decide a doubtful scale of the latents by the samples of a model that was read from a file; says so in one line.

    A student in training does not decide: its samples are not yet what its teacher's are.
    """
    if not _doubtful(codec, model):
        return
    figures = scale_figures(codec, states)
    logger.warning(f"scale_factor: {figures.best:g} is taken ({figures}); scale_factor=NUMBER states another")
    codec.scale_factor, codec.doubt = figures.best, ""


def require_sampling(model: "DiffusionModel", config: SamplingConfig) -> Sampler:
    """The sampler of a config, checked to fit this model.

    Raises:
        UserError: as `DiffusionModel.sample`.
    """
    sampler = pick(SAMPLERS, config.sampler, "sampler")
    sampler.timesteps(model.schedule, steps_of(model, config))  # refuses what does not fit
    if config.eta and not sampler.takes_eta:
        raise UserError(f"eta: has no effect with {config.sampler}; leave it out")
    if config.labels and model.classes is None:
        raise UserError("labels: the model is unconditional; leave them out")
    outside = [label for label in config.labels if label not in (model.classes or ())]
    if outside:
        raise UserError(f"labels: {outside[0]} is not one of the model's {len(model.classes or ())} classes")
    return sampler


def steps_of(model: "DiffusionModel", config: SamplingConfig) -> int:
    """The sampling steps of a config; default: the sampler's."""
    default = pick(SAMPLERS, config.sampler, "sampler").default_steps
    return config.steps or min(default or model.schedule.num_timesteps, model.schedule.num_timesteps)


def labels_of(model: "DiffusionModel", config: SamplingConfig, first: int, count: int) -> Tensor | None:
    """Labels (count,) of the images first ... first+count-1."""
    classes, numbers = model.classes, range(first, first + count)
    if classes is None:
        return None
    if config.labels:
        return torch.tensor([config.labels[i % len(config.labels)] for i in numbers], device="cpu")
    draws = [numpy_generator(config.seed + i, 0, 0, "label").integers(len(classes)) for i in numbers]
    return torch.tensor([classes[draw] for draw in draws], device="cpu")
