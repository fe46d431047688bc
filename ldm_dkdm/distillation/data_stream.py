"""Training batches from data (Alg. 2): the target is the noise that was added."""

import torch
from torch import Tensor

from ldm_dkdm.diffusion.process import q_sample
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.distillation.batches import BatchStream
from ldm_dkdm.distillation.image_data import States
from ldm_dkdm.records import DistillBatch, Prediction
from ldm_dkdm.rng import torch_generator


class DataStream(BatchStream):
    """Noises clean states to random t (Alg. 2, lines 2-3).

    Args:
        states: the source of x_0.
        schedule: the forward process.
        batch_size, max_steps, seed, rank, device, first_step: as in `DistillStream`.
        t_cap: cap of `NoiseSchedule.timesteps_at`; None: t ~ U[0, T-1].
    """

    def __init__(
        self,
        states: States,
        schedule: NoiseSchedule,
        batch_size: int,
        max_steps: int,
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str = "cpu",
        first_step: int = 0,
        t_cap: float | None = None,
    ) -> None:
        self.states, self.schedule = states, schedule
        self.t_cap = t_cap
        self.batch_size, self.max_steps = batch_size, max_steps
        self.seed, self.rank, self.device, self.step = seed, rank, device, first_step

    def next_batch(self) -> DistillBatch:
        """Draw B states with replacement, t one from each of B strata, eps ~ N(0, I)."""
        generator = torch_generator(self.seed, self.rank, self.step, "data")
        x_0, label = self.states.draw(self.batch_size, generator)
        t = self._timesteps(generator)
        noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float32, device=generator.device)
        x_t = q_sample(self.schedule, x_0, t, noise)
        self.step += 1
        x_t, t, noise, x_0 = (tensor.to(self.device) for tensor in (x_t, t, noise, x_0))
        return DistillBatch(x_t, t, Prediction(noise, x_0), None if label is None else label.to(self.device))

    def _timesteps(self, generator: torch.Generator) -> Tensor:
        """Stratified t (B,): each has the density of `timesteps_at`, a batch covers it evenly (VDM, App. I.1)."""
        offsets = torch.rand(self.batch_size, generator=generator, dtype=torch.float64, device=generator.device)
        quantiles = (torch.arange(self.batch_size, device=offsets.device) + offsets) / self.batch_size
        return self.schedule.timesteps_at(quantiles, self.t_cap)
