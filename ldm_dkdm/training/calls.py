"""Make the configuration of a run from the models and arguments of a Python call."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm_dkdm.config.checked import convert
from ldm_dkdm.config.schema import (
    DiffusionConfig,
    DiffusionDataConfig,
    DiffusionRun,
    DistillConfig,
    DistillRun,
    FirstStageConfig,
    LoggingConfig,
    LossConfig,
    NewNetworkConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
    WarmupConfig,
)
from ldm_dkdm.errors import UserError, nearest
from ldm_dkdm.model import DiffusionModel

IN_MEMORY = "a model made in Python"


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
        UserError: an unknown or missing argument, or a bad value.
    """
    method, trainer, logging = _spread(numbers, (DistillConfig, TrainerConfig, LoggingConfig), out)
    warming = convert(WarmupConfig, {"mode": warmup} if isinstance(warmup, str) else warmup, "warmup")
    return DistillRun(
        teacher=_teacher_section(teacher, check),
        student=StudentConfig(**vars(student.node)),
        distill=DistillConfig(warmup=warming, loss=_loss(loss), **method),
        trainer=TrainerConfig(**trainer),
        first_stage=teacher.hints.first_stage if teacher.space.encoded else FirstStageConfig(),
        diffusion=DiffusionConfig(**teacher.hints.diffusion) if teacher.hints.diffusion else None,
        logging=LoggingConfig(**logging),
    )


def _teacher_section(teacher: DiffusionModel, check: bool) -> TeacherConfig:
    hints = teacher.hints
    return TeacherConfig(
        ckpt=str(teacher.path or IN_MEMORY),
        target=hints.target,
        params=dict(hints.params),
        parameterization=hints.parameterization,
        use_ema=hints.use_ema,
        guidance=teacher.guidance,
        null_label=hints.null_label,
        check=check,
    )


def training_of(
    model: DiffusionModel,
    data: str | Path | Mapping[str, Any] | DiffusionDataConfig,
    out: Path,
    loss: str | Mapping[str, Any] | LossConfig,
    numbers: Mapping[str, Any],
) -> DiffusionRun:
    """The configuration of a call of `train`.

    Raises:
        UserError: an unknown or missing argument, or a bad value.
    """
    named = vars(data) if isinstance(data, DiffusionDataConfig) else data
    named = {"path": str(named)} if isinstance(named, (str, Path)) else named
    given = {"image_size": _image_size(model), **{k: v for k, v in numbers.items() if v is not None}, **named}
    images, trainer, logging = _spread(given, (DiffusionDataConfig, TrainerConfig, LoggingConfig), out)
    stage = FirstStageConfig()
    if model.first_stage is not None:
        found = model.first_stage
        stage = FirstStageConfig(str(found.path), found.target, dict(found.params), found.scale_factor)
    return DiffusionRun(
        model=NewNetworkConfig(**vars(model.node)),
        diffusion=model.diffusion,
        data=DiffusionDataConfig(**images),
        trainer=TrainerConfig(**trainer),
        first_stage=stage,
        loss=_loss(loss),
        logging=LoggingConfig(**logging),
    )


def _image_size(model: DiffusionModel) -> int:
    """Side in pixels of what the model's states decode to."""
    autoencoder = getattr(model.codec(), "autoencoder", None)
    return model.shape[1] * getattr(autoencoder, "downsampling", 1)


def _loss(loss: str | Mapping[str, Any] | LossConfig) -> LossConfig:
    return convert(LossConfig, {"space": loss} if isinstance(loss, str) else loss, "loss")


def _spread(numbers: Mapping[str, Any], sections: tuple[type, ...], out: Path) -> list[dict[str, Any]]:
    """Sort arguments by the section that has their key; the last section also gets the folder `out`."""
    owners = {f.name: i for i, section in enumerate(sections) for f in fields(section)}
    spread: list[dict[str, Any]] = [{} for _ in sections]
    spread[-1] = {"dir": str(out.parent), "name": out.name}
    given = {key: value for key, value in numbers.items() if value is not None}
    for key, value in given.items():
        if key not in owners:
            raise UserError(f"{key}: unknown argument{nearest(key, owners)}")
        spread[owners[key]][key] = value
    for key, word in (("max_steps", "steps"), ("batch_size", "batch_size")):
        if key not in given:
            raise UserError(f"{word}: missing")
    return spread
