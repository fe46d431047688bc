"""Convert forward processes from and to the configs of diffusers' schedulers; no key is ignored silently."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ldm_dkdm.checkpoints.contents import clipping_of, schedule_of
from ldm_dkdm.checkpoints.diffusers_betas import GIVEN
from ldm_dkdm.checkpoints.source import read_json
from ldm_dkdm.checkpoints.writing import SavedModel
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.diffusion.clipping import Clipping
from ldm_dkdm.errors import UserError
from ldm_dkdm.pixel import SPACES, Space
from ldm_dkdm.reporting import logger

T = TypeVar("T")
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
VARIANCES = {"fixed_small": None, "fixed_small_log": None, "fixed_large": "beta"}  # theirs -> ours; None: posterior
LEARNED = "learned_range"
ANCESTRAL, IMPLICIT = ("DDPMScheduler", "DDPMParallelScheduler"), ("DDIMScheduler", "DDIMParallelScheduler")
SOLVERS = (
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)  # other samplers of the same forward process; the samplers here replace them
CLASSES = (*ANCESTRAL, *IMPLICIT, *SOLVERS)
# Keys of all classes whose other values mean a process or a prediction that this package does not have.
NEEDED: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "timestep_type": ("discrete", None),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "snr_shift_scale": (None, 1, 1.0),
    "timestep_values": (None,),
}
READ = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
CONVENTIONS = ("variance_type", "set_alpha_to_one", "steps_offset", "timestep_spacing")
OF_CLIPPING = ("clip_sample", "clip_sample_range")
OF_THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
RESCALED = "rescale_betas_zero_snr"
PREDICTS_EPS = "predict_epsilon"  # what the first versions of diffusers have for `prediction_type`
WIDE_ENDS = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
ENDS, ENDS_OF_WIDE = (1e-4, 0.02), (0.00085, 0.012)  # defaults of beta_start, beta_end
OTHER_WALKS = ("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas")
OF_SOLVERS = (
    "algorithm_type",
    "corrector_order",
    "disable_corrector",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "predict_x0",
    "predictor_order",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
    "time_shift_type",
    *OTHER_WALKS,
)  # how a solver walks, not what the network was trained on
KNOWN = {
    *NEEDED,
    *READ,
    *CONVENTIONS,
    *OF_CLIPPING,
    *OF_THRESHOLDING,
    *OF_SOLVERS,
    RESCALED,
    PREDICTS_EPS,
    "tensor_format",
}


def require_process(kind: Any, where: str) -> str:
    """The name of a scheduler's class whose process is one of this package.

    Raises:
        UserError: no name, or that of another process.
    """
    if kind not in CLASSES:
        found = f"{kind} is another process" if kind else "stores no _class_name"
        known = ", ".join(CLASSES[::2][:2])
        raise UserError(f"{where}: {found}; only discrete DDPM processes work, such as {known}")
    return str(kind)


def process(path: Path, space: str, learns_variance: bool) -> tuple[DiffusionConfig, str]:
    """The forward process of a scheduler's config, and what the network predicts.

    Args:
        path: scheduler_config.json. space: of the states. learns_variance: the network has twice the channels.

    Raises:
        UserError: another process, or a key that this package cannot honour; names the file and the key.
    """
    config = read_json(path)
    kind = require_process(config.get("_class_name"), str(path))
    for key, allowed in NEEDED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key}: {config[key]!r} is not supported, only {allowed[0]!r}")
    unknown = sorted(key for key in set(config) - KNOWN if not key.startswith("_"))
    if unknown:
        logger.warning("%s: %s: not a key of diffusers' %s, ignored", path, ", ".join(unknown), kind)
    if walks := [key for key in OTHER_WALKS if config.get(key)]:
        logger.warning("%s: %s: ignored; --sampler decides how steps are spaced", path, ", ".join(walks))
    parameterization = _prediction(path, config)
    rescaled = _flag(path, config, RESCALED, False)
    if rescaled and parameterization == "eps":
        raise UserError(
            f"{path}: {RESCALED}: True does not fit prediction_type epsilon: the last timestep is pure noise, of which "
            "eps says nothing about the image"
        )
    own: dict[str, Any] = {
        "space": space,
        "variance": _variance(path, config, kind, learns_variance),
        RESCALED: rescaled,
        **_clipping(path, config, kind, SPACES[space]),
        **_timesteps(path, config, kind, SPACES[space]),
    }
    return _checked(path, {**_betas(path, config, kind), **own}), parameterization


def _checked(path: Path, keys: Mapping[str, Any]) -> DiffusionConfig:
    """The section with these keys."""
    try:
        found = DiffusionConfig(**keys)
        schedule_of(found)  # refuses ends that make no schedule
    except UserError as error:
        raise UserError(f"{path}: {_in_their_words(str(error))}") from error
    return found


def _in_their_words(message: str) -> str:
    """A message on one of our keys with the library's name of it."""
    key = re.match(r"\w+", message)
    theirs = {"num_timesteps": "num_train_timesteps", "betas": "trained_betas", "schedule": "beta_schedule"}
    return theirs.get(key[0], key[0]) + message[key.end() :] if key else message


def _named(path: Path, config: Mapping[str, Any], key: str, default: str, names: Mapping[str, T]) -> T:
    value = config.get(key, default)
    if not isinstance(value, str) or value not in names:
        raise UserError(f"{path}: {key}: {value!r} is not one of {', '.join(names)}")
    return names[value]


def _flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise UserError(f"{path}: {key}: expected true or false, got {value!r}")
    return default if value is None else value


def _prediction(path: Path, config: Mapping[str, Any]) -> str:
    """What the network predicts; `predict_epsilon: false` of the first versions means x0."""
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    kind = _named(path, config, "prediction_type", "epsilon", kinds)
    if config.get(PREDICTS_EPS) is None:
        return kind
    older = "eps" if _flag(path, config, PREDICTS_EPS, True) else "x0"
    if "prediction_type" in config and older != kind:
        raise UserError(
            f"{path}: {PREDICTS_EPS}: {config[PREDICTS_EPS]} contradicts prediction_type: {config['prediction_type']}; "
            "remove one"
        )
    return older


def _betas(path: Path, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The noise schedule, as keys of `DiffusionConfig`."""
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or not all(isinstance(b, (int, float)) and 0 < b < 1 for b in betas):
            raise UserError(f"{path}: trained_betas: expected numbers, each strictly between 0 and 1")
        if len(betas) != steps:
            raise UserError(f"{path}: num_train_timesteps: {steps}, but trained_betas has {len(betas)} values")
        return {"num_timesteps": steps, "betas": betas}
    names = {theirs: ours for ours, theirs in SCHEDULES.items()} | {name: name for name in GIVEN}
    schedule = _named(path, config, "beta_schedule", "linear", names)
    found = {"schedule": schedule, "num_timesteps": steps}
    if schedule == "cosine":
        return found
    start, end = ENDS_OF_WIDE if kind in WIDE_ENDS else ENDS
    ends = {"beta_start": config.get("beta_start", start), "beta_end": config.get("beta_end", end)}
    if schedule not in GIVEN:
        return found | ends
    known = _checked(path, {**found, "schedule": "linear", **ends})  # refuses what are no numbers of steps or ends
    return {"num_timesteps": steps, "betas": GIVEN[schedule](steps, known.beta_start, known.beta_end)}


def _clipping(path: Path, config: Mapping[str, Any], kind: str, space: Space) -> dict[str, Any]:
    """Keys of `DiffusionConfig` where x_0 is not clipped as usual in the space; solvers have no clip_sample."""
    if _flag(path, config, "thresholding", False):
        return {name: config[name] for name in OF_THRESHOLDING if name in config}
    if kind in SOLVERS and "clip_sample" not in config:
        return {}
    clips, limit = _flag(path, config, "clip_sample", True), config.get("clip_sample_range", 1.0)
    if clips and space.encoded:
        shown = "true" if "clip_sample" in config else f"absent, which means true in a {kind}"
        logger.warning("%s: clip_sample: %s; latents are clipped to +-%g in sampling", path, shown, limit)
    usual = space.clip is not None
    found: dict[str, Any] = {} if clips == usual else {"clip_sample": clips}
    return found | ({"clip_sample_range": limit} if clips and limit != (space.clip or 1.0) else {})


def _variance(path: Path, config: Mapping[str, Any], kind: str, learned: bool) -> str | None:
    """`diffusion.variance`; None for the posterior's, and for a variance that the network predicts."""
    value = config.get("variance_type", "fixed_small" if kind in ANCESTRAL and not learned else None)
    if value is None:
        return None
    if learned or value == LEARNED:
        if learned and value in (
            LEARNED,
            "fixed_small",
        ):  # the second is the default, and the network's own replaces it
            return None
        outputs = "twice as many channels as" if learned else "as many channels as"
        raise UserError(f"{path}: variance_type: {value!r} does not fit a UNet with {outputs} its input")
    return _named(path, config, "variance_type", "fixed_small", VARIANCES)


def _timesteps(path: Path, config: Mapping[str, Any], kind: str, space: Space) -> dict[str, Any]:
    """Keys of `DiffusionConfig` for timesteps that are not the space's; a spacing that is absent stays open."""
    found = {"timestep_spacing": config.get("timestep_spacing")}
    solver = kind in SOLVERS
    if solver and not {"steps_offset", "set_alpha_to_one"} & set(config):
        return found
    offset = config.get("steps_offset", space.steps_offset if solver else 0)
    if offset not in (0, 1):
        raise UserError(f"{path}: steps_offset: {offset} is not supported, only 0 and 1")
    if kind in ANCESTRAL and space.encoded and found["timestep_spacing"] is None:
        return found  # DDIM has its space's
    ends_at_x0 = _flag(path, config, "set_alpha_to_one", offset == 0 if solver else True)
    return {
        **found,
        "steps_offset": None if offset == space.steps_offset else offset,
        "set_alpha_to_one": None if ends_at_x0 == (offset == 0) else ends_at_x0,
    }


def scheduler_config(model: SavedModel) -> dict[str, Any]:
    """Config of the diffusers scheduler that samples as this package does."""
    diffusion, schedule = model.diffusion, model.schedule
    named = diffusion.betas is None and diffusion.schedule in SCHEDULES
    common = {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": SCHEDULES.get(diffusion.schedule, "linear"),
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "trained_betas": None if named else schedule.unscaled_betas.tolist(),
        "prediction_type": PREDICTIONS[model.node.parameterization],
        **_clipping_config(clipping_of(diffusion)),
    }
    if schedule.ends_in_noise:
        common[RESCALED] = True
    if schedule.timestep_spacing is not None:
        common["timestep_spacing"] = schedule.timestep_spacing
    offset, to_x0 = schedule.steps_offset, schedule.set_alpha_to_one
    params, fixed = model.node.params, "fixed_large" if schedule.variance == "beta" else "fixed_small"
    if model.space.encoded or (offset, to_x0) != (0, True):
        # a DDIMScheduler does not read the variance, but hands it to a DDPMScheduler that is made from its config
        kept = {"variance_type": fixed} if schedule.variance == "beta" else {}
        return {"_class_name": "DDIMScheduler", **common, "set_alpha_to_one": to_x0, "steps_offset": offset, **kept}
    learned = params["out_channels"] == 2 * params["in_channels"]
    return {"_class_name": "DDPMScheduler", **common, "variance_type": LEARNED if learned else fixed}


def _clipping_config(clipping: Clipping) -> dict[str, Any]:
    if clipping.quantile is not None:
        values = (True, clipping.quantile, clipping.largest)
        return {"clip_sample": False, **dict(zip(OF_THRESHOLDING, values, strict=True))}
    if clipping.limit in (None, 1.0):
        return {"clip_sample": clipping.limit is not None}
    return {"clip_sample": True, "clip_sample_range": clipping.limit}
