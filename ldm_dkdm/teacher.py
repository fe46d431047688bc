"""The frozen teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_dkdm.denoiser import Denoiser
from ldm_dkdm.device import autocast
from ldm_dkdm.diffusion.process import reverse_step
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.records import NoisyBatch, Prediction


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): u + weight (c - u), in one call of twice the batch.

    c is the network's prediction with the label, u the one with `null_label`; a learned variance stays c's.
    """

    network: nn.Module
    weight: float
    null_label: int

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """States x (B,C,H,W), timesteps t (B,), labels (B,) -> the guided output of the network."""
        labels = torch.cat([label, torch.full_like(label, self.null_label)])
        with_label, without = self.network(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        channels = x.shape[1]
        guided = without[:, :channels] + self.weight * (with_label[:, :channels] - without[:, :channels])
        return torch.cat([guided, with_label[:, channels:]], 1)


def class_labels(network: nn.Module, null_label: int | None) -> list[int] | None:
    """The labels of a network's table without the one that means none; None for an unconditional network."""
    if getattr(network, "num_classes", None) is None:
        return None
    own = getattr(network, "null_label", None) if null_label is None else null_label
    return [label for label in range(network.num_classes) if label != own]


class Teacher:
    """A frozen denoiser and its schedule.

    Args:
        network: nn.Module (x, t, label) -> (B,C,H,W); it is put in eval mode and frozen.
        schedule: the forward process that it was trained on.
        parameterization: what the network predicts, `eps` or `v`.
        precision: `bf16` runs the network under autocast, `32` does not.
        denoiser: how its output is read; `pixel.PixelDenoiser` in pixel space.
        guidance: weight of classifier-free guidance; 1 leaves it out.
        null_label: the label that means none; default: the network's own.

    Raises:
        UserError: guidance for a network that takes no labels or has none that means none; a null label that
            its table does not hold.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        parameterization: str = "eps",
        precision: str = "32",
        denoiser: type[Denoiser] = Denoiser,
        guidance: float = 1.0,
        null_label: int | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.schedule, self.precision = schedule, precision
        self.num_classes = getattr(network, "num_classes", None)
        own = getattr(network, "null_label", None)
        self.null_label = own if null_label is None else null_label
        labels = 0 if self.num_classes is None else self.num_classes + (own is not None)
        if self.null_label is not None and self.null_label >= labels:
            raise UserError(f"teacher.null_label: {self.null_label} is outside the network's table of {labels} labels")
        predict = self.network if guidance == 1 else self._guided(guidance)
        self.denoiser = denoiser(predict, schedule, parameterization)

    def _guided(self, weight: float) -> Guidance:
        if self.num_classes is None:
            raise UserError("teacher.guidance: the teacher takes no labels; remove the key")
        if self.null_label is None:
            raise UserError("teacher.null_label: guidance needs the label that means none; set the key")
        return Guidance(self.network, weight, self.null_label)

    def to(self, device: torch.device | str) -> "Teacher":
        """Move the network; returns self."""
        self.network.to(device)
        return self

    @property
    def classes(self) -> list[int] | None:
        """The labels that mean a class; None for an unconditional network."""
        return class_labels(self.network, self.null_label)

    def draw_labels(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Labels (count,) of classes, uniformly at random; None for an unconditional network."""
        if self.num_classes is None:
            return None
        classes = torch.tensor(self.classes, device=generator.device)
        return classes[torch.randint(len(classes), (count,), generator=generator, device=generator.device)]

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """eps and x_0 at states x (B,C,H,W), timesteps t (B,), labels (B,): one network call."""
        with autocast(self.precision, x.device):
            return self.denoiser(x, t, label)

    @torch.no_grad()
    def step(self, batch: NoisyBatch, noise: Tensor, stride: int | Tensor = 1) -> tuple[Prediction, Tensor]:
        """The prediction at x_t and, from the SAME call, x_{t-stride} (DKDM, dynamic iterative distillation)."""
        prediction = self.predict(batch.x, batch.t, batch.label)
        return prediction, reverse_step(self.schedule, batch.x, batch.t, prediction, noise, stride)
