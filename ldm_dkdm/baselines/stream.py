"""Training examples from data (Alg. 2): the target is the noise that was added."""

import torch
from torch import Tensor

from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.records import DistillBatch, Prediction
from ldm_dkdm.rng import torch_generator
from ldm_dkdm.streams import BatchStream


class DataStream(BatchStream):
    """Noises clean latents to random t (Alg. 2, lines 2-3).

    Args:
        latents: x_0 (N,C,H,W), scaled.
        schedule: the forward process.
        batch_size, max_steps: as in `DistillStream`, and so are seed, rank, device, first_step.
        t_cap: cap of `NoiseSchedule.timesteps_at`; None: t ~ U[0, T-1].
    """

    def __init__(
        self,
        latents: Tensor,
        schedule: NoiseSchedule,
        batch_size: int,
        max_steps: int,
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str = "cpu",
        first_step: int = 0,
        t_cap: float | None = None,
    ) -> None:
        self.latents, self.schedule = latents, schedule
        self.t_cap = t_cap
        self.batch_size, self.max_steps = batch_size, max_steps
        self.seed, self.rank, self.device, self.step = seed, rank, device, first_step

    def next_batch(self) -> DistillBatch:
        """Draw B latents with replacement, t one from each of B strata, eps ~ N(0, I)."""
        generator = torch_generator(self.seed, self.rank, self.step, "data")
        x_0 = self.latents[torch.randint(len(self.latents), (self.batch_size,), generator=generator)]
        t = self._timesteps(generator)
        noise = torch.randn(x_0.shape, generator=generator)
        x_t = q_sample(self.schedule, x_0, t, noise)
        self.step += 1
        return DistillBatch(x_t.to(self.device), t.to(self.device), Prediction(noise.to(self.device)))

    def _timesteps(self, generator: torch.Generator) -> Tensor:
        """Stratified t (B,): each has the wanted density, a batch covers it evenly (VDM, App. I.1)."""
        offsets = torch.rand(self.batch_size, generator=generator, dtype=torch.float64)
        quantiles = (torch.arange(self.batch_size) + offsets) / self.batch_size
        return self.schedule.timesteps_at(quantiles, self.t_cap)


@torch.no_grad()
def encode_images(codec: LatentCodec, images: Tensor, flip: bool, batch_size: int = 64) -> Tensor:
    """Images uint8 (N,H,W,C) -> scaled latents (N or 2N,C,h,w), mirrored images included if `flip`."""
    sets = [images, images.flip(2)] if flip else [images]
    return torch.cat([codec.encode(part) for whole in sets for part in whole.split(batch_size)])
