"""What a network predicts is a property of the denoiser that wraps it, not of the architecture."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm_dkdm.diffusion.process import v_to_eps
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.records import Prediction


@dataclass(frozen=True)
class Denoiser:
    """A network (x, t, label) -> tensor seen as a predictor of eps.

    Attributes:
        network: predicts what `parameterization` says, (B,C,H,W).
        schedule: the forward process that it was trained on.
        parameterization: `eps` or `v`.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    parameterization: str = "eps"

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """States x (B,C,H,W) at timesteps t (B,) -> the predicted noise, float32."""
        output = self.network(x, t, label).float()
        if self.parameterization == "v":
            output = v_to_eps(self.schedule, x.float(), t, output)
        return Prediction(output)
