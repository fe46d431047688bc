"""What a network predicts is a property of the denoiser that wraps it, not of the architecture."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm_dkdm.diffusion.process import eps_to_x0, v_to_eps, v_to_x0
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.records import Prediction


@dataclass(frozen=True)
class Denoiser:
    """A network (x, t, label) -> tensor seen as a predictor of eps and x_0, and of a variance if it has one.

    With twice the channels of x, the output's second half is `Prediction.var_fraction` (learned-range
    variance, Improved DDPM, Eq. 15).

    Attributes:
        network: predicts what `parameterization` says, (B,C,H,W).
        schedule: the forward process that it was trained on.
        parameterization: `eps` or `v`.
    """

    network: Callable[..., Tensor]
    schedule: NoiseSchedule
    parameterization: str = "eps"

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """States x (B,C,H,W) at timesteps t (B,) with labels (B,) -> the prediction, float32."""
        return self.read(self.network(x, t, label).float(), x.float(), t)

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """The prediction that a network's output at x means."""
        channels = x.shape[1]
        fraction = output[:, channels:] if output.shape[1] > channels else None
        output = output[:, :channels]
        if self.parameterization == "v":
            return Prediction(v_to_eps(self.schedule, x, t, output), v_to_x0(self.schedule, x, t, output), fraction)
        return Prediction(output, eps_to_x0(self.schedule, x, t, output), fraction)
