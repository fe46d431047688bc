"""The section of the forward process, and of what sampling makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ldm_dkdm.config.checked import Section, key, literal, one_of
from ldm_dkdm.errors import UserError

SCHEDULE = "ldm_dkdm.diffusion.schedule"
# keys of sampling alone, which older versions dropped from the schedule of a model made in Python
ONCE_UNSAID = ("steps_offset", "set_alpha_to_one", "timestep_spacing")


@dataclass(frozen=True)
class DiffusionConfig(Section):
    """The forward process (`NoiseSchedule`) and the space in which it runs."""

    schedule: str = one_of(
        f"{SCHEDULE}:SCHEDULES",
        "scaled_linear",
        help="Noise schedule; `scaled_linear` is what CompVis calls linear.",
    )
    num_timesteps: int = key(
        1000, min=1, max=100_000, help="Number of timesteps T.", why="models have a thousand or a few"
    )
    beta_start: float = key(None, above=0, help="First beta; null is 0.0015 (`scaled_linear`) or 0.1 / T (`linear`).")
    beta_end: float = key(None, above=0, help="Last beta; null is 0.0195 (`scaled_linear`) or 20 / T (`linear`).")
    space: str = one_of(
        "ldm_dkdm.pixel:SPACES",
        "latent",
        help="`pixel` has no first stage, clips x_0 to [-1,1] and can learn the variance.",
    )
    betas: Sequence[float] | None = key(
        None, above=0, below=1, help="All T betas, in place of `schedule`, `beta_start` and `beta_end`."
    )
    variance: str | None = one_of(
        "ldm_dkdm.diffusion.schedule:VARIANCES",
        None,
        help="Variance of a reverse step: the `posterior`'s (diffusers' fixed_small), or `beta` (fixed_large); "
        "default: the model's, else `posterior`.",
    )
    steps_offset: int | None = key(
        None,
        min=0,
        max=1,
        help="DDIM's lowest timestep: 0, and samples end at x_0; 1, and they end at abar_0; default: the model's, "
        "else 0 in pixel space and 1 in latent space.",
    )
    rescale_timesteps: bool = key(
        False, help="The network takes t * 1000 / T; improved-diffusion's default, false in guided-diffusion."
    )

    rescale_betas_zero_snr: bool = key(
        False,
        help="The betas are rescaled so that x_{T-1} is pure noise (zero terminal SNR); the network predicts v or x0.",
    )
    timestep_spacing: str | None = one_of(
        "ldm_dkdm.diffusion.timesteps:SPACINGS",
        None,
        help="Timesteps of samplers with fewer than T steps, as in diffusers; null leaves each its own, and `leading` "
        "those of dpm-solver++.",
    )
    set_alpha_to_one: bool | None = key(
        None, help="DDIM ends at x_0; false: at abar_0; default: the model's, else true where `steps_offset` is 0."
    )
    clip_sample: bool | None = key(None, help="Sampling clips x_0; default: the model's, else true in pixel space.")
    clip_sample_range: float | None = key(None, above=0, help="Limit of `clip_sample`; default: the model's, else 1.")
    thresholding: bool | None = key(
        None, help="Sampling clips x_0 at a quantile of each sample and divides by it (dynamic thresholding)."
    )
    dynamic_thresholding_ratio: float | None = key(
        None, above=0, max=1, help="The quantile of `thresholding`; default: the model's, else 0.995."
    )
    sample_max_value: float | None = key(
        None, min=1, help="Largest limit of `thresholding`, which is at least 1; default: the model's, else 1."
    )

    def __post_init__(self) -> None:
        """Set the ends that are not given or not used, and `num_timesteps` to the number of `betas`, where given."""
        ends = dict(zip(("beta_start", "beta_end"), _ends(self.schedule, self.num_timesteps), strict=True))
        for name, value in ends.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        if self.schedule == "cosine":
            for name, value in ends.items():  # the same process has the same section, whatever a file says
                object.__setattr__(self, name, value)
        if self.betas is None:
            return
        default = next(f.default for f in fields(self) if f.name == "num_timesteps")
        if not self.betas:
            raise UserError("betas: expected one beta per timestep, got an empty list")
        if self.num_timesteps not in (default, len(self.betas)):
            raise UserError(
                f"num_timesteps: {self.num_timesteps} is not the number of betas, which is {len(self.betas)}"
            )
        object.__setattr__(self, "num_timesteps", len(self.betas))


def _ends(schedule: object, num_timesteps: object) -> tuple[float, float]:
    """`diffusion.schedule.beta_ends`, without importing torch; arguments may be invalid."""
    ends = literal(f"{SCHEDULE}:BETA_ENDS")
    start, end, steps = ends.get(schedule, ends["scaled_linear"])
    scale = steps / num_timesteps if steps and isinstance(num_timesteps, int) and num_timesteps > 0 else 1.0
    return min(0.999, start * scale), min(0.999, end * scale)
