"""Refuse keys of a configuration, or hints, that another key or hint leaves without effect."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ldm_dkdm.config.process_section import DiffusionConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.reporting import logger

NETWORKS = ("teacher", "student", "model")  # sections with the parameters of a network


class Idle(NamedTuple):
    """Keys of one section that another key of it can leave without effect.

    Attributes:
        section: the dotted key of the section. keys: those that may be without effect. cause: the key that decides.
        why: given the section of the run that has them all, the reason; empty where the keys have an effect.
    """

    section: str
    keys: Sequence[str]
    cause: str
    why: Callable[[Any], str]


def _unread_with(keys: Sequence[str], cause: str, *values: str) -> Idle:
    """Keys of a distillation that are not read where another key has one of these values; those that users add may."""

    def why(method: Any) -> str:
        value = attrgetter(cause)(method)
        return f"with {cause.rpartition('.')[2]}: {value}" if value in values else ""

    return Idle("distill", keys, cause, why)


IDLE = (
    _unread_with(("rho",), "variant", "iterative", "shuffled"),
    _unread_with(("warmup.mode", "warmup.steps", "warmup.images"), "variant", "iterative"),
    _unread_with(("warmup.steps",), "warmup.mode", "ancestral", "harvest", "noise"),
    _unread_with(("warmup.images",), "warmup.mode", "ancestral", "noise"),
    Idle("distill", ("discard_mode",), "discard", lambda method: "" if method.discard else "without discard"),
    Idle("data", ("fraction",), "path", lambda data: "" if data.path else "without path"),
)


def idle_keys(config: DiffusionConfig) -> dict[str, str]:
    """The keys of a process that change nothing, whatever their values, and why."""
    found: dict[str, str] = {}
    if config.betas is not None:
        found |= dict.fromkeys(("schedule", "beta_start", "beta_end"), "beside betas")
    elif config.schedule == "cosine":
        found |= dict.fromkeys(("beta_start", "beta_end"), "with schedule: cosine")
    if config.thresholding:
        found["clip_sample_range"] = "with thresholding: true"
        if config.clip_sample:  # false says the same
            found["clip_sample"] = "with thresholding: true"
        return found
    found |= dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), "without thresholding: true")
    if not (config.space == "pixel" if config.clip_sample is None else config.clip_sample):
        found["clip_sample_range"] = "without clip_sample: true"
    return found


def require_effect(given: Mapping[str, Any], config: DiffusionConfig, key: Callable[[str], str], drop: str) -> None:
    """Refuse keys that the user gives and that another one leaves without effect.

    Args:
        given: what the user gives of the process; None is not given.
        config: the whole process.
        key: how the user writes a key. drop: the advice to do without it.

    Raises:
        UserError: names the key and what stands in its way.
    """
    idle = idle_keys(config)
    for name, value in given.items():
        if name == "num_timesteps" and config.betas is not None and value not in (None, len(config.betas)):
            raise UserError(f"{key(name)}: {value} is not the number of betas, which is {len(config.betas)}; {drop}")
        if value is not None and name in idle:
            raise UserError(f"{key(name)}: has no effect {idle[name]}; {drop}")


def require_effects(tree: Mapping[str, Any], config: Any) -> None:
    """The same for the sections of a run's configuration; what equals its default may come from a run's folder.

    Of the parameters of a network, which may be pasted from another code, a warning names those without effect.

    Args:
        tree: the sections as they are given.
        config: the configuration that they mean.

    Raises:
        UserError: names the key and what stands in its way.
    """
    process: DiffusionConfig | None = getattr(config, "diffusion", None)
    if process is not None:
        usual = {**vars(DiffusionConfig(process.schedule, process.num_timesteps)), "num_timesteps": None}
        usual["schedule"] = DiffusionConfig.schedule
        given = {name: value for name, value in tree["diffusion"].items() if value != usual.get(name)}
        require_effect(given, process, "diffusion.{}".format, "remove it or set it to null")
    for section in NETWORKS:
        params = getattr(getattr(config, section, None), "params", None) or {}
        if heads_without_effect(params):
            logger.warning(f"{section}.params.num_heads: has no effect beside num_head_channels; remove one of them")


def refuse_idle(parts: Sequence[Any], config: Any, prefix: str = "") -> None:
    """Refuse keys that another one leaves without effect, and warn of those that are given beside that one.

    Where that one is given after them, as a recipe's warm-up is replaced by one that needs fewer keys, nothing is said.
    The config of a run folder holds every section with all keys, and says nothing about what its user wanted.

    Args:
        parts: trees of config files and of overrides, each of which goes before those to its left.
        config: the configuration that they mean.
        prefix: what is left out of the key in a message, since the user does not write it.

    Raises:
        UserError: names the key and what stands in its way.
    """
    trees: list[Any] = [
        OmegaConf.to_container(part, resolve=False) if isinstance(part, DictConfig) else part for part in parts
    ]
    for rule in IDLE:
        section = getattr(config, rule.section, None)
        why = "" if section is None else rule.why(section)
        if not why:
            continue
        cause = _last(trees, f"{rule.section}.{rule.cause}")
        for name in rule.keys:
            key = f"{rule.section}.{name}"
            given = _last(trees, key)
            if given < max(cause, 0) or _is_of_run(trees[given], config) or _is_default(section, name):
                continue
            line = f"{key.removeprefix(prefix)}: has no effect {why}"
            if given > cause:
                raise UserError(f"{line}; remove it")
            logger.warning(line)


def _last(parts: Sequence[Any], key: str) -> int:
    """The place of the last part that gives a key; -1 where none does."""
    return max((place for place, part in enumerate(parts) if _in(part, key) is not None), default=-1)


def _in(part: Any, key: str) -> Any:
    """The value of a dotted key; None where it is not given."""
    for name in key.split("."):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part


def _is_of_run(part: Mapping[str, Any], config: Any) -> bool:
    """Whether a part is the config of a run folder: those of older versions lack keys, but no section."""
    return set(vars(config)) <= set(part) and {"dir", "name"} <= set(part.get("logging") or ())


def _is_default(section: Any, name: str) -> bool:
    """Whether a key has its default."""
    for inner in name.split(".")[:-1]:
        section = getattr(section, inner)
    key = name.rpartition(".")[2]
    return bool(getattr(section, key) == section.__dataclass_fields__[key].default)


def heads_without_effect(params: Mapping[str, Any]) -> bool:
    """Whether a UNet's parameters have a number of heads that `num_head_channels` replaces."""
    return params.get("num_heads") not in (None, -1, 1) and params.get("num_head_channels") not in (None, -1)
