"""What the user states of a checkpoint."""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ldm_dkdm.checkpoints.shapes import plain
from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.other_names import NOT_HERE, OUR_NAMES
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageConfig, TeacherConfig
from ldm_dkdm.errors import UserError, near
from ldm_dkdm.networks.arguments import native


@dataclass(frozen=True)
class Hints:
    """What the user states of a checkpoint, because its tensors do not show it.

    Attributes:
        params: parameters of the network.
        target: the network's class, where the whole architecture is given.
        parameterization: `eps`, `v` or `x0`.
        use_ema: EMA or raw weights; None: EMA where the file has them.
        null_label: the label for no class.
        diffusion: keys of the forward process.
        first_stage: replaces the model's first stage, or its scale.
        verify: compare weights with the hashes that they were written with; None: yes.
        sections: the hints come from a config; messages use its dotted keys.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    parameterization: str | None = None
    use_ema: bool | None = None
    null_label: int | None = None
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    verify: bool | None = None
    sections: bool = False

    @classmethod
    def of(cls, **given: Any) -> "Hints":
        """Hints by flat names: `first_stage` (a path), `scale_factor`, keys of `diffusion`, parameters of the network.

        None means not given.
        """
        given = {key: native(value) for key, value in given.items() if value is not None}
        diffusion = {f.name: given.pop(f.name) for f in fields(DiffusionConfig) if f.name in given}
        stage = {ours: given.pop(name) for name, ours in STAGE_HINTS.items() if name in given}
        stage = {key: str(value) if key == "ckpt" else value for key, value in stage.items()}
        own = {name: given.pop(name) for name in OWN_HINTS if name in given}
        verify = convert(bool | None, given.pop("verify", None), "verify")
        params = {**convert(Mapping[str, Any], given.pop("params", {}), "params"), **given}
        TeacherConfig("", **own)  # refuses bad values
        if diffusion:
            DiffusionConfig(**diffusion)  # refuses bad values
        return cls(**own, params=params, diffusion=diffusion, first_stage=FirstStageConfig(**stage), verify=verify)

    @classmethod
    def of_sections(
        cls,
        teacher: TeacherConfig,
        diffusion: DiffusionConfig | None,
        first_stage: FirstStageConfig,
        verify: bool | None = None,
    ) -> "Hints":
        """Hints from the sections of a distillation's config."""
        own = {name: getattr(teacher, name) for name in OWN_HINTS}
        process = {} if diffusion is None else asdict(diffusion)
        return cls(
            **own, params=teacher.params, diffusion=process, first_stage=first_stage, verify=verify, sections=True
        )

    @property
    def given(self) -> set[str]:
        """The flat names (`Hints.of`) of the hints that are given."""
        own = {name for name in OWN_HINTS if getattr(self, name) is not None}
        stage = {name for name, ours in STAGE_HINTS.items() if getattr(self.first_stage, ours) is not None}
        return {*own, *stage, *self.params, *self.diffusion, *(["verify"] if self.verify is not None else [])}

    def spelled_as(self, shown: Mapping[str, Any]) -> "Hints":
        """The hints with guided-diffusion's spelling of values as here: `1,2` or a number for a list, its defaults.

        Args:
            shown: parameters that the file's tensors show.
        """
        params = {}
        for key, value in self.params.items():
            if is_needless(key, value):
                continue
            stored = shown.get(key)
            listed = _listed(value) if isinstance(stored, (list, tuple)) else value
            sets = [{*map(str, items)} for items in (listed, stored) if isinstance(items, (list, tuple))]
            same = key == FACTORS and len(sets) == 2 and sets[0] == sets[1]
            params[key] = stored if same else listed  # their order has no meaning
        return replace(self, params=params)

    def require_known(self, parameters: Collection[str], target: str, shown: Mapping[str, Any]) -> None:
        """Refuse a parameter that a network does not have, such as a misspelt hint or another code's name of one.

        Args:
            parameters: the network's.
            target: its class, for messages.
            shown: parameters that the file's tensors show.

        Raises:
            UserError: the hint, with our name or the nearest one.
        """
        for key in (key for key in self.params if key not in parameters):
            what = f"unknown parameter of {target}" if self.sections else "is not a hint"
            raise UserError(f"{self.key(key)}: {what}; {self._right_name(key, parameters, shown)}")

    def _right_name(self, key: str, parameters: Collection[str], shown: Mapping[str, Any]) -> str:
        if key in NOT_HERE:
            return NOT_HERE[key]
        if key in OUR_NAMES:
            own = OUR_NAMES[key]
            if own.hint in shown:
                return f"here it is {own.hint}, {plain(shown[own.hint])} by the tensors; {self.drop}"
            return f"write {self.key(own.hint)}={own.value}"
        others = {*OWN_HINTS, *STAGE_HINTS, *(f.name for f in fields(DiffusionConfig))}
        names = [*parameters, *sorted(others - set(parameters))]
        for close in near(key, names, cutoff=0.5):
            right = close if close in parameters else self.key(STAGE_HINTS.get(close, close))
            return f"did you mean '{right}'?"
        return f"valid keys: {', '.join(parameters if self.sections else names)}"

    @property
    def drop(self) -> str:
        """The advice to do without a hint."""
        return "remove the key" if self.sections else "leave it out"

    def key(self, name: str) -> str:
        """How the user writes a hint: its name, or its dotted key in a config."""
        if not self.sections:
            return {ours: name for name, ours in STAGE_HINTS.items()}.get(name, name)
        if name in {f.name for f in fields(DiffusionConfig)}:
            return f"diffusion.{name}"
        if name in STAGE_HINTS.values():
            return f"first_stage.{name}"
        return f"teacher.{name}" if name in OWN_HINTS else f"teacher.params.{name}"


def is_needless(key: str, value: Any) -> bool:
    """Whether a hint is another code's default, which says nothing that is not so here."""
    return key in NEEDLESS and value in NEEDLESS[key]


def _listed(value: Any) -> Any:
    """A list of numbers that is written as a number or as `1,2,4`; anything else as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    text = value[1:-1].rstrip(", ") if value[:1] + value[-1:] == "()" else value  # a tuple of Python
    return [float(n) if "." in n else int(n) for n in text.split(",")] if NUMBERS.fullmatch(text) else value


FACTORS = "attention_resolutions"
NEEDLESS = {"num_heads_upsample": (-1,)}  # guided-diffusion's option -> values at which it is the network here
NUMBERS = re.compile(r" *\d+(\.\d+)? *(, *\d+(\.\d+)? *)*")
OWN_HINTS = ("target", "parameterization", "use_ema", "null_label")
STAGE_HINTS = {"first_stage": "ckpt", "scale_factor": "scale_factor"}  # name in `Hints.of` -> key
