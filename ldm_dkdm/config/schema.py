"""The configurations of the three training commands, and the cards of model and first-stage folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ldm_dkdm.config.checked import Section, key, one_of
from ldm_dkdm.config.data_sections import (
    CodebookConfig,
    DataConfig,
    DiffusionDataConfig,
    FirstStageLoss,
    SamplingConfig,
)
from ldm_dkdm.config.logging_section import LoggingConfig
from ldm_dkdm.config.process_section import DiffusionConfig
from ldm_dkdm.config.sections import (
    FIRST_STAGES,
    SCALES,
    DistillConfig,
    EarlyStopConfig,
    FirstStageConfig,
    LossConfig,
    NetworkConfig,
    NewNetworkConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
    WarmupConfig,
)

__all__ = [
    "CodebookConfig",
    "DataConfig",
    "DiffusionConfig",
    "DiffusionDataConfig",
    "DiffusionRun",
    "DistillConfig",
    "DistillRun",
    "EarlyStopConfig",
    "FirstStageCard",
    "FirstStageConfig",
    "FirstStageLoss",
    "FirstStagePointer",
    "FirstStageRun",
    "LoggingConfig",
    "LossConfig",
    "ModelCard",
    "NetworkConfig",
    "NewNetworkConfig",
    "SamplingConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainerConfig",
    "WarmupConfig",
]


@dataclass(frozen=True)
class DistillRun(Section):
    """Configuration of a distillation (Alg. 1)."""

    SCRIPT: ClassVar[str] = "dkdm_ldm.py"
    COMMAND: ClassVar[str] = "distill"
    MODEL: ClassVar[str] = "student"  # model folder in the run folder
    teacher: TeacherConfig = key(help="The pretrained model.")
    student: StudentConfig = key(help="The network to train, or a budget for a narrowed copy of the teacher's.")
    distill: DistillConfig = key(help="The method: pool, batches, loss and warm-up.")
    trainer: TrainerConfig = key(help="Optimisation and hardware.")
    first_stage: FirstStageConfig = key(factory=FirstStageConfig, help="The teacher's first stage, in latent space.")
    diffusion: DiffusionConfig | None = key(
        None, help="The teacher's forward process, where its file does not store it."
    )
    logging: LoggingConfig = key(factory=LoggingConfig, help="Where the run writes and how often, in training steps.")


@dataclass(frozen=True)
class DiffusionRun(Section):
    """Configuration of a training on images (Alg. 2), in latent or pixel space."""

    SCRIPT: ClassVar[str] = "train_ldm.py"
    COMMAND: ClassVar[str] = "train"
    MODEL: ClassVar[str] = "model"
    model: NewNetworkConfig = key(help="The network to train.")
    diffusion: DiffusionConfig = key(help="The forward process and its space.")
    data: DiffusionDataConfig = key(help="The training images.")
    trainer: TrainerConfig = key(help="Optimisation and hardware.")
    first_stage: FirstStageConfig = key(factory=FirstStageConfig, help="The first stage, in latent space.")
    loss: LossConfig = key(factory=LossConfig, help="The model's loss.")
    logging: LoggingConfig = key(factory=LoggingConfig, help="Where the run writes and how often, in training steps.")


@dataclass(frozen=True)
class FirstStageRun(Section):
    """Configuration of a first stage's training."""

    SCRIPT: ClassVar[str] = "train_first_stage.py"
    COMMAND: ClassVar[str] = "train-first-stage"
    MODEL: ClassVar[str] = "first_stage"
    first_stage: FirstStageConfig = key(help="The first stage to train.")
    data: DataConfig = key(help="The training images.")
    trainer: TrainerConfig = key(help="Optimisation and hardware.")
    loss: FirstStageLoss = key(factory=FirstStageLoss, help="Weights of the loss; 0 switches a term off.")
    codebook: CodebookConfig = key(factory=CodebookConfig, help="How the codebook is initialised and kept in use.")
    hue: float = key(0.0, min=0, max=0.5, help="Largest random change of the images' hue, as a share of the circle.")
    logging: LoggingConfig = key(factory=LoggingConfig, help="Where the run writes and how often, in training steps.")


@dataclass(frozen=True)
class FirstStagePointer(Section):
    """Where a model's first stage is; `target` and `params` describe one that is not a folder of this package."""

    path: str = key(help="Path of the first stage, relative to the model folder.")
    scale_factor: float = key(help="Factor from encoded images to the network's latents.", **SCALES)
    target: str | None = one_of(FIRST_STAGES, None, help="Name of the first stage's class.")
    params: dict[str, Any] = key(factory=dict, help="Keyword arguments of that class.")
    absolute: str | None = key(None, help="The path from the root, for a model folder that was moved alone.")


@dataclass(frozen=True)
class ModelCard(Section):
    """config.yaml of a model folder, which describes the model."""

    KIND: ClassVar[str] = "a model folder"
    weights: str = key(help="Name of the file with the weights, in the same folder.")
    network: NetworkConfig = key(help="The network.")
    diffusion: DiffusionConfig = key(help="The forward process.")
    first_stage: FirstStagePointer | None = key(None, help="Where the first stage is, in latent space.")
    null_label: int | None = key(None, min=0, help="Label for no class, where the network does not define it.")
    info: dict[str, Any] = key(factory=dict, help="Facts about the training, for the model card.")
    shape: Sequence[int] | None = key(
        None, min=1, max=65536, length=3, help="Shape (C,H,W) of the states, where the network does not define it."
    )
    num_classes: int | None = key(None, min=1, help="Number of classes, where the network does not define it.")


@dataclass(frozen=True)
class FirstStageCard(Section):
    """config.yaml of a first-stage folder."""

    KIND: ClassVar[str] = "a first-stage folder"
    weights: str = key(help="Name of the file with the weights, in the same folder.")
    target: str = one_of(FIRST_STAGES, help="Name of the first stage's class.")
    params: dict[str, Any] = key(help="Keyword arguments of that class.")
    scale_factor: float = key(1.0, help="Factor from encoded images to the network's latents.", **SCALES)
    info: dict[str, Any] = key(factory=dict, help="Facts about the training, such as its steps.")
