"""Make the configuration of a run from the models and arguments of a Python call."""

import hashlib
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.config.batches import divided
from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.effects import refuse_idle
from ldm_dkdm.config.load import LONGEST
from ldm_dkdm.config.process_section import ONCE_UNSAID
from ldm_dkdm.config.schema import (
    DiffusionConfig,
    DiffusionDataConfig,
    DiffusionRun,
    DistillConfig,
    DistillRun,
    FirstStageConfig,
    FirstStageRun,
    LoggingConfig,
    LossConfig,
    NewNetworkConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
    WarmupConfig,
)
from ldm_dkdm.errors import UserError, nearest
from ldm_dkdm.files import expanded, read_text
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.model.arguments import kind_of
from ldm_dkdm.reporting import Progress
from ldm_dkdm.training.run import Run
from ldm_dkdm.training.run_folder import IN_MEMORY, RunFolder

WORDS = {"steps": "max_steps"}  # argument -> config key, where the names differ
GIVEN = {"out": "FOLDER", "data": "FOLDER"}  # what stands for the value of such an argument in a message
SECTIONS = ("distill", "data", "trainer", "logging")  # sections of a config whose keys are arguments
NAMED = {"max_steps": "steps", "dir": "out", "name": "out", "path": "data"}  # config key -> argument that gives it


def distillation_of(
    teacher: DiffusionModel,
    student: DiffusionModel,
    out: Path,
    check: bool,
    warmup: str | Mapping[str, Any] | WarmupConfig,
    loss: str | Mapping[str, Any] | LossConfig,
    numbers: Mapping[str, Any],
) -> DistillRun:
    """The configuration of a call of `distill`.

    Raises:
        UserError: an unknown, missing or contradictory argument, a bad value, or one that has no effect; what a run
            began with may have none.
    """
    _refuse_named(numbers)
    method, trainer, logging = _spread(numbers, (DistillConfig, TrainerConfig, LoggingConfig), out)
    warming = convert(WarmupConfig, {"mode": warmup} if isinstance(warmup, str) else warmup, "warmup")
    with _in_arguments():
        sections = TrainerConfig(**trainer), LoggingConfig(**logging)
    run = DistillRun(
        teacher=_teacher_section(teacher, check, out),
        student=StudentConfig(**vars(student.node)),
        distill=DistillConfig(warmup=warming, loss=_loss(loss), **method),
        trainer=sections[0],
        first_stage=teacher.hints.first_stage if teacher.space.encoded else FirstStageConfig(),
        diffusion=DiffusionConfig(**teacher.hints.diffusion) if teacher.hints.diffusion else None,
        logging=sections[1],
    )
    if not (out / "config.yaml").is_file():
        refuse_idle([{"distill": {**method, "warmup": vars(warming)}}], run, "distill.")
    return run


def _teacher_section(teacher: DiffusionModel, check: bool, out: Path) -> TeacherConfig:
    hints = teacher.hints
    return TeacherConfig(
        ckpt=str(teacher.path or _name_in(out, teacher)),
        target=hints.target,
        params=dict(hints.params),
        parameterization=hints.parameterization,
        use_ema=hints.use_ema,
        guidance=teacher.guidance,
        null_label=hints.null_label,
        check=check,
    )


def _name_in(out: Path, teacher: DiffusionModel) -> str:
    """The name of a teacher without a file; in a run that began without ONCE_UNSAID, the one that it has there."""
    process, stored = teacher.diffusion, out / "config.yaml"
    nothing: dict[str, Any] = dict.fromkeys(ONCE_UNSAID)
    unsaid = replace(process, **nothing)
    if unsaid != process and stored.is_file():
        name = f"{IN_MEMORY} ({_fingerprint(teacher, unsaid)})"
        if name in read_text(stored, LONGEST):
            return name
    return f"{IN_MEMORY} ({_fingerprint(teacher, process)})"


def _fingerprint(model: DiffusionModel, process: DiffusionConfig) -> str:
    """Eight bytes, hexadecimal, that tell a model without a file from others: of its weights and their meaning."""
    digest = hashlib.sha256(f"{process} {model.parameterization} {model.null_label}".encode())
    for name, value in model.network.state_dict().items():
        if isinstance(value, Tensor):  # not a module's extra state
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def training_of(
    model: DiffusionModel,
    data: str | Path | Mapping[str, Any] | DiffusionDataConfig,
    out: Path,
    loss: str | Mapping[str, Any] | LossConfig,
    numbers: Mapping[str, Any],
) -> DiffusionRun:
    """The configuration of a call of `train`.

    Raises:
        UserError: an unknown, missing or contradictory argument, or a bad value.
    """
    named: Any = vars(data) if isinstance(data, DiffusionDataConfig) else data
    named = {"path": str(named)} if isinstance(named, (str, Path)) else named
    if not isinstance(named, Mapping):
        advice = "arrays are saved with numpy.savez(FILE, arr_0=IMAGES)"
        raise UserError(f"data: expected a folder, an .npz file or keys, got {kind_of(data)}; {advice}")
    numbers = {key: value for key, value in numbers.items() if value is not None}
    _refuse_named(numbers)
    for key, value in named.items():
        if numbers.get(key, value) != value:
            both = f"{value}, but {numbers[key]} is given by the argument {key}"
            raise UserError(f"data.{key}: {both}; leave one of them out")
    given = {"image_size": _image_size(model), **numbers, **named}
    images, trainer, logging = _spread(given, (DiffusionDataConfig, TrainerConfig, LoggingConfig), out)
    with _in_arguments():
        section, training, log = DiffusionDataConfig(**images), TrainerConfig(**trainer), LoggingConfig(**logging)
    if "mix" in given:
        section.require_mixture()
    if not (out / "config.yaml").is_file():
        refuse_idle([{"data": images}], SimpleNamespace(data=section))
    stage = FirstStageConfig()
    if model.first_stage is not None:
        found = model.first_stage
        stage = FirstStageConfig(str(found.path), found.target, dict(found.params), found.scale_factor)
    return DiffusionRun(
        model=NewNetworkConfig(**vars(model.node)),
        diffusion=model.diffusion,
        data=section,
        trainer=training,
        first_stage=stage,
        loss=_loss(loss),
        logging=log,
    )


def run_of(
    kind: type[DistillRun | DiffusionRun | FirstStageRun],
    config: Any,
    out: str | Path,
    resume: bool,
    progress: bool | Progress,
    signals: Sequence[int],
    go_on: str | None,
) -> Run:
    """The run of a call, whose configuration is of a `kind`.

    Raises:
        UserError: names an argument of another type; else as `Run`.
    """
    expected = {
        "config": (config, kind.__name__, isinstance(config, kind)),
        "resume": (resume, "True or False", isinstance(resume, bool)),
        "progress": (progress, "True, False or a function", isinstance(progress, bool) or callable(progress)),
        "signals": (signals, "signals in a tuple", isinstance(signals, Collection)),
        "go_on": (go_on, "text", isinstance(go_on, str | None)),
    }
    for name, (value, words, fits) in expected.items():
        if not fits:
            advice = f"; load_config(FILE, schema={words}) reads one" if name == "config" else ""
            raise UserError(f"{name}: expected {words}, got {kind_of(value)}{advice}")
    for number in signals:
        if number not in signal.valid_signals():
            raise UserError(f"signals: {number!r} is not a signal; take one of the module signal, such as SIGINT")
    return Run(config, RunFolder(expanded(out), kind.MODEL), resume, progress, signals, go_on)


def refuse_beside(config: Any, numbers: Mapping[str, Any]) -> None:
    """Refuse arguments that a whole configuration gives.

    Raises:
        UserError: the first one.
    """
    for key, value in numbers.items():
        if config is not None and value is not None:
            raise UserError(f"{key}: given by config already; leave one of them out")


def _refuse_named(numbers: Mapping[str, Any]) -> None:
    """Refuse config keys that an argument of another name gives, also with their section."""
    for key, value in numbers.items():
        section, _, bare = key.rpartition(".")
        if bare in NAMED and section in ("", *SECTIONS):
            raise _of_argument(key, NAMED[bare], value)


def _of_argument(key: str, word: str, value: Any) -> UserError:
    """The error of a config key in place of the argument that gives it."""
    return UserError(f"{key}: is the argument {word} here; write {word}={GIVEN.get(word, repr(value))}")


@contextmanager
def _in_arguments() -> Iterator[None]:
    """Name the argument in a message that begins with the config key which it gives."""
    try:
        yield
    except UserError as error:
        key, colon, rest = str(error).partition(":")
        if key not in NAMED:
            raise
        raise UserError(f"{NAMED[key]}{colon}{rest}") from error


def _image_size(model: DiffusionModel) -> int:
    """Side in pixels of what the model's states decode to."""
    autoencoder = getattr(model.codec(), "autoencoder", None)
    return model.shape[1] * getattr(autoencoder, "downsampling", 1)


def _loss(loss: str | Mapping[str, Any] | LossConfig) -> LossConfig:
    return convert(LossConfig, {"space": loss} if isinstance(loss, str) else loss, "loss")


def _spread(numbers: Mapping[str, Any], sections: tuple[type, ...], out: Path) -> list[dict[str, Any]]:
    """Sort arguments by the section that has their key: batches, trainer, logging, which also gets the folder `out`."""
    owners = {f.name: i for i, section in enumerate(sections) for f in fields(section)}
    spread: list[dict[str, Any]] = [{} for _ in sections]
    spread[-1] = {"dir": str(out.parent), "name": out.name}
    given = {WORDS.get(key, key): value for key, value in numbers.items() if value is not None}
    for key, value in given.items():
        named, _, bare = key.rpartition(".")
        if named in SECTIONS and bare in owners:
            raise _of_argument(key, bare, value)
        if key not in owners:
            raise UserError(f"{key}: unknown argument{nearest(key, dict.fromkeys(NAMED.get(k, k) for k in owners))}")
        spread[owners[key]][key] = value
    spread[0] = divided(spread[0], spread[1])
    for key, word, section in (("max_steps", "steps", 1), ("batch_size", "batch_size", 0)):
        if key not in spread[section]:
            raise UserError(f"{word}: missing")
    return spread
