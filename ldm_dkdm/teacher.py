"""The frozen teacher."""

import torch
from torch import Tensor, nn

from ldm_dkdm.denoiser import Denoiser
from ldm_dkdm.diffusion.process import reverse_step
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.precision import autocast
from ldm_dkdm.records import NoisyBatch, Prediction


class Teacher:
    """A frozen denoiser and its schedule.

    Args:
        network: nn.Module (x, t, label) -> (B,C,H,W); it is put in eval mode and frozen.
        schedule: the forward process that it was trained on.
        parameterization: what the network predicts, `eps` or `v`.
        precision: `bf16` runs the network under autocast, `32` does not.
    """

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, parameterization: str = "eps", precision: str = "32"
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.schedule, self.precision = schedule, precision
        self.denoiser = Denoiser(self.network, schedule, parameterization)

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network; returns self."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """eps of states x (B,C,H,W) at timesteps t (B,), one network call."""
        with autocast(self.precision, x.device):
            return self.denoiser(x, t, label)

    @torch.no_grad()
    def step(self, batch: NoisyBatch, noise: Tensor, stride: int = 1) -> tuple[Prediction, Tensor]:
        """The prediction at x_t and, from the SAME call, x_{t-stride} (DKDM, dynamic iterative distillation)."""
        prediction = self.predict(batch.x, batch.t, batch.label)
        return prediction, reverse_step(self.schedule, batch.x, batch.t, prediction.eps, noise, stride)
