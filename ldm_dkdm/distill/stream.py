"""The stream of training examples: one teacher call each, never two (DKDM, Alg. 1 and Sec. 3.3)."""

import torch

from ldm_dkdm.distill.pool import NoisyPool
from ldm_dkdm.records import DistillBatch, NoisyBatch
from ldm_dkdm.rng import numpy_generator, torch_generator
from ldm_dkdm.streams import BatchStream
from ldm_dkdm.teacher import Teacher


class DistillStream(BatchStream):
    """Draws slots, lets the teacher predict and step them, and hands over the prediction.

    Args:
        teacher: on the device where the batches are wanted.
        pool: filled.
        batch_size: B slots an iteration.
        max_steps: iterations of the whole training.
        seed, rank: with the step, they decide every random choice.
        stride: timesteps that a drawn slot advances.
        device: where the student trains.
        first_step: iterations already done.
    """

    def __init__(
        self,
        teacher: Teacher,
        pool: NoisyPool,
        batch_size: int,
        max_steps: int,
        seed: int = 0,
        rank: int = 0,
        stride: int = 1,
        device: torch.device | str = "cpu",
        first_step: int = 0,
    ) -> None:
        self.teacher, self.pool = teacher, pool
        self.batch_size, self.max_steps, self.stride = batch_size, max_steps, stride
        self.seed, self.rank, self.device = seed, rank, device
        self.step = first_step

    def next_batch(self) -> DistillBatch:
        """Draw, predict, step, put back; the pool is up to date when the batch is handed over."""
        indices = self.pool.draw(self.batch_size, numpy_generator(self.seed, self.rank, self.step, "draw"))
        x, t = (tensor.to(self.device) for tensor in self.pool.take(indices))
        target, x_next = self.teacher.step(NoisyBatch(x, t), self._noise(x, "step_noise"), self.stride)
        t_next = t - self.stride
        finished = t_next < 0
        x_next = torch.where(finished.view(-1, 1, 1, 1), self._noise(x, "fresh_noise"), x_next)
        t_next = torch.where(finished, self.teacher.schedule.num_timesteps - 1, t_next)
        self.pool.put_back(indices, x_next, t_next)
        self.step += 1
        return DistillBatch(x, t, target)

    def _noise(self, like: torch.Tensor, purpose: str) -> torch.Tensor:
        generator = torch_generator(self.seed, self.rank, self.step, purpose, like.device)
        return torch.randn(like.shape, generator=generator, device=like.device)
