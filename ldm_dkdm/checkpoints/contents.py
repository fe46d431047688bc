"""What a checkpoint stores of a diffusion model, completed by hints."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.ema_names import other_kind_beside, said_of_file
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.hints import FACTORS, Hints
from ldm_dkdm.checkpoints.process_keys import SAMPLING, kept_beside
from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.config.effects import require_effect
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageConfig, NetworkConfig
from ldm_dkdm.diffusion.clipping import Clipping
from ldm_dkdm.diffusion.schedule import DEFAULT, NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.pixel import SPACES
from ldm_dkdm.reporting import logger


@dataclass(frozen=True)
class Demand:
    """A parameter that tensor shapes do not show: any one of `keys` gives it; `hint` says what is usual."""

    keys: tuple[str, ...]
    hint: str


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file or folder stores of a diffusion model.

    Attributes:
        path: file or folder of the model; `file` holds its weights.
        format: its name in FORMATS.
        target, params: the network, as far as it is known.
        raw_file: holds the raw weights, where `file` holds the EMA weights alone.
        ema, raw: weights under the network's own names; `raw` where the file does not distinguish them.
        use_ema: which weights a config beside the file asks for, where it does.
        several_emas: refuses a choice among EMAs beside `raw`, where the file holds several.
        demands: parameters that must be given as hints.
        usual: values that tensor shapes do not show, but a config beside the file gives, or nearly all such files have.
        parameterization: None where the format stores none; then it is eps unless a hint says otherwise.
        diffusion: the forward process; None where it must be given; then `unknown_schedule` says more, where a config
            beside the file names one.
        alphas_cumprod: the stored schedule (T,), in the file's precision.
        space: default of this format. usual_schedule: that of most of its models, where they have one.
        first_stage: its source; None where unknown. scale_factor: of its latents, where the file says only that.
        described: the model describes itself; hints are not needed and must not contradict it.
    """

    path: Path
    format: str
    target: str
    params: Mapping[str, Any]
    file: Path
    ema: Mapping[str, Tensor] | None = None
    raw: Mapping[str, Tensor] | None = None
    raw_file: Path | None = None
    use_ema: bool | None = None
    several_emas: str = ""
    demands: Sequence[Demand] = ()
    usual: Mapping[str, Any] = field(default_factory=dict)
    parameterization: str | None = None
    diffusion: DiffusionConfig | None = None
    unknown_schedule: str = ""
    alphas_cumprod: Tensor | None = None
    space: str = "latent"
    usual_schedule: str = ""
    first_stage: FirstStageSource | None = None
    scale_factor: float | None = None
    null_label: int | None = None
    shape: Sequence[int] | None = None
    num_classes: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    described: bool = False

    def weights(self, hints: Hints) -> Mapping[str, Tensor]:
        """The network's tensors: EMA unless the hints say raw; the only kind where there is one.

        Raises:
            UserError: the requested kind is missing or several times there, or a model that describes itself has one.
        """
        key = hints.key("use_ema")
        if self.described and hints.use_ema is not None and None in (self.ema, self.raw):
            raise UserError(f"{key}: {self.path} describes itself and holds one set of weights; {hints.drop}")
        wanted = self.wants_ema(hints)
        if self.several_emas and self.ema is None and wanted is not False:
            raise UserError(f"{self.several_emas}, or set {key}=false for the raw weights")
        found = self.raw if wanted is False or (wanted is None and self.ema is None) else self.ema
        if found is None and hints.sections and said_of_file(self.file) and (other := self.ema or self.raw):
            has = "EMA weights only, as its name says; they" if self.ema else "an EMA of an unknown form; raw weights"
            logger.warning(f"{key}: {str(wanted).lower()}, but {self.path} holds {has} are used")
            return other  # a run of an older version may have begun with them
        if found is None:
            has, value, kind = ("no EMA weights", "false", "the EMA") if wanted else ("EMA weights only", "true", "raw")
            named = ", as its name says" if said_of_file(self.file) is (not wanted) else ""
            near = other_kind_beside(self.file)
            beside = f"; {kind} weights of this step are in {near}" if near else ""
            raise UserError(f"{self.path}: holds {has}{named}; set {key}={value}, or {hints.drop}{beside}")
        return found

    def named(self) -> "Contents":
        """The same with its only set of weights as EMA, where the name of their file says so (`ema_0.9999_010000.pt`).

        Then a config beside the file, which may be that of the training, does not ask for raw weights.
        """
        if self.described or self.ema is not None or said_of_file(self.file) is not True:
            return self
        return replace(self, ema=self.raw, raw=None, use_ema=None)

    def wants_ema(self, hints: Hints) -> bool | None:
        """Whether EMA or raw weights are asked for, by the hints or by a config beside the file."""
        return self.use_ema if hints.use_ema is None else hints.use_ema

    def network(self, hints: Hints) -> NetworkConfig:
        """The whole network: the file's part and the hints.

        Raises:
            UserError: something is missing, or a hint contradicts the file.
        """
        if self.described:
            self._refuse_descriptions(hints)
            return NetworkConfig(self.target, dict(self.params), self.parameterization or "eps")
        kind = hints.parameterization or self.parameterization or "eps"
        if hints.target is not None:
            return NetworkConfig(hints.target, dict(hints.params), kind)
        self._refuse_contradictions(hints)
        missing = self.missing(hints.params)
        if missing:
            wanted = "; ".join(f"{' or '.join(map(hints.key, demand.keys))} ({demand.hint})" for demand in missing)
            raise UserError(f"{self.path}: tensor shapes do not show everything; set {wanted}")
        others = {
            key for d in self.demands if set(d.keys) & set(hints.params) for key in d.keys
        }  # alternatives of a given hint
        usual = {key: value for key, value in self.usual.items() if key not in others}
        return NetworkConfig(self.target, {**usual, **self.params, **hints.params}, kind)

    def accepted(self, hints: Hints) -> Hints:
        """The hints without those that this model does not need, since it describes itself: they are for others."""
        if not self.described:
            return hints
        kind = self.parameterization or "eps"
        same = {key: value for key, value in hints.params.items() if plain(value) == plain(self.params.get(key))}
        process = asdict(self.diffusion) if self.diffusion else dict(hints.diffusion)
        latent = self.diffusion is None or SPACES[self.diffusion.space].encoded
        return replace(
            hints,
            target=self.target if hints.target == self.target else None,
            parameterization=kind if hints.parameterization == kind else None,
            params=same,
            diffusion={key: value for key, value in hints.diffusion.items() if plain(value) == plain(process[key])},
            use_ema=None if None in (self.ema, self.raw) else hints.use_ema,
            null_label=hints.null_label if self.null_label in (None, hints.null_label) else None,
            first_stage=hints.first_stage if latent else FirstStageConfig(),
        )

    def missing(self, given: Mapping[str, Any]) -> list[Demand]:
        """What is neither known nor given."""
        known = {*given, *self.usual}
        return [demand for demand in self.demands if not any(key in known for key in demand.keys)]

    def _refuse_contradictions(self, hints: Hints) -> None:
        for key, value in hints.params.items():
            if key in self.params and plain(value) != plain(self.params[key]):
                stored = self.params[key]
                sides = "; here they are downsampling factors, not sides of images" if key == FACTORS else ""
                raise UserError(f"{hints.key(key)}: {plain(value)}, but the tensors of {self.path} say {stored}{sides}")

    def _refuse_descriptions(self, hints: Hints) -> None:
        own = {"target": self.target, "parameterization": self.parameterization or "eps"}
        given = {key: getattr(hints, key) for key in own if getattr(hints, key) is not None} | dict(hints.params)
        for key, value in given.items():
            stored = own[key] if key in own else self.params.get(key)
            if plain(value) != plain(stored):
                shown = f"{key}: {plain(stored)}" if key in own or key in self.params else f"no {key}"
                raise UserError(f"{hints.key(key)}: {self.path} describes itself ({shown}); {hints.drop}")

    def process(self, hints: Hints) -> DiffusionConfig:
        """The forward process: the stored one, which a hint must not contradict, or the one that hints give.

        Raises:
            UserError: there is neither, they differ, or a hint has no effect beside another one.
        """
        given = dict(hints.diffusion)
        if not given and self.diffusion is not None:
            return self.diffusion
        if self.diffusion is None:
            if not {"schedule", "betas"} & set(given):
                raise UserError(self._no_schedule(hints))
            return self._completed(hints, {"space": self.space})
        wanted = self._completed(hints, {} if hints.sections else kept_beside(self.diffusion, given))
        if self.alphas_cumprod is not None:
            check_schedule(self.alphas_cumprod, schedule_of(wanted), self.path)
            unsaid = [key for key in SAMPLING if getattr(wanted, key) is None]
            return replace(wanted, **{key: getattr(self.diffusion, key) for key in unsaid})
        return self._same_process(self.diffusion, wanted, hints)

    @staticmethod
    def _completed(hints: Hints, kept: Mapping[str, Any]) -> DiffusionConfig:
        """The process of hints beside what is known; a config's section is complete, and checked where it is read."""
        found = DiffusionConfig(**{**kept, **hints.diffusion})
        if not hints.sections:
            require_effect(hints.diffusion, found, hints.key, hints.drop)
        return found

    def _same_process(self, stored: DiffusionConfig, wanted: DiffusionConfig, hints: Hints) -> DiffusionConfig:
        own, here = asdict(stored), asdict(wanted)
        differences = [
            f"{hints.key(key)}: {here[key]}, but the model's is {own[key]}"
            for key in own
            if here[key] != own[key] and not (key in SAMPLING and here[key] is None)
        ]
        if differences:
            raise UserError(
                f"{'; '.join(differences)} ({self.path}); " + ("remove the section" if hints.sections else hints.drop)
            )
        return stored

    def _no_schedule(self, hints: Hints) -> str:
        schedule = self.usual_schedule or ("cosine" if self.space == "pixel" else "scaled_linear")
        usual = {"space": self.space, "schedule": schedule}
        example = " ".join(f"{hints.key(key)}={value}" for key, value in {**usual, "num_timesteps": 1000}.items())
        known = f", and {self.unknown_schedule}" if self.unknown_schedule else ""
        return f"{self.path} ({self.format}) stores no noise schedule{known}; set it, for example {example}"


def schedule_of(config: DiffusionConfig) -> NoiseSchedule:
    """The forward process that a config section describes."""
    named = config.betas is None
    ends = named and config.schedule != "cosine"
    return NoiseSchedule(
        config.schedule if named else DEFAULT,
        config.num_timesteps,
        config.beta_start if ends else None,
        config.beta_end if ends else None,
        config.steps_offset,
        betas=config.betas,
        variance=config.variance or "posterior",
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing=config.timestep_spacing,
        set_alpha_to_one=config.set_alpha_to_one,
        usual_offset=SPACES[config.space].steps_offset,
    )


def clipping_of(config: DiffusionConfig) -> Clipping:
    """What sampling makes of x_0, from a config section."""
    space = SPACES[config.space]
    if config.thresholding:
        return Clipping(None, config.dynamic_thresholding_ratio or 0.995, config.sample_max_value or 1.0)
    if config.clip_sample is False or (config.clip_sample is None and space.clip is None):
        return Clipping()
    return Clipping(config.clip_sample_range or space.clip or 1.0)


def check_schedule(
    stored: Tensor,
    schedule: NoiseSchedule,
    source: str | Path,
    where: str = "diffusion",
    keys: str = "schedule, num_timesteps, beta_start or beta_end",
) -> None:
    """Refuse a given schedule that is not the `alphas_cumprod` (T,) that a checkpoint was trained with."""
    wanted = schedule.alphas_cumprod
    if not _close(stored, wanted):
        raise UserError(
            f"{where}: {source} was trained with {_ends(stored)}, the given values mean {_ends(wanted)}; correct {keys}"
        )


def same_process(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether two schedules are equal to the tolerance of `check_schedule`, whatever they are called."""
    return _close(one.alphas_cumprod, other.alphas_cumprod)


def described(schedule: NoiseSchedule) -> str:
    """A schedule's name, T and alphas_cumprod at its ends and its middle, for messages."""
    return f"{'own betas' if schedule.name == 'betas' else schedule.name}, {_ends(schedule.alphas_cumprod)},"


def _close(stored: Tensor, wanted: Tensor) -> bool:
    return stored.shape == wanted.shape and torch.allclose(stored.double(), wanted, rtol=tolerance(stored), atol=1e-6)


def tolerance(stored: Tensor) -> float:
    """Relative tolerance between a stored and a given schedule: 0.1%, or the stored precision if coarser."""
    return max(1e-3, torch.finfo(stored.dtype).eps)


def _ends(abar: Tensor) -> str:
    return f"T = {len(abar)}, alphas_cumprod {abar[0]:.6f} ... {abar[len(abar) // 2]:.6f} ... {abar[-1]:.6f}"
