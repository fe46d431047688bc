"""The sections of a configuration and what each key may hold."""

from dataclasses import dataclass, field
from typing import Any, Literal

POSITIVE = {"above": 0}
NOT_NEGATIVE = {"min": 0}
AT_LEAST_ONE = {"min": 1}


@dataclass(frozen=True)
class NetworkConfig:
    """A network as CompVis writes one: `target` and `params`."""

    target: str
    params: dict[str, Any]
    parameterization: Literal["eps", "v"] = "eps"


@dataclass(frozen=True)
class TeacherConfig:
    """A model folder (it describes itself), or a foreign checkpoint with `target` and `params`."""

    ckpt: str
    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    parameterization: Literal["eps", "v"] | None = None  # of a foreign checkpoint; default eps
    use_ema: bool | None = None  # of a foreign checkpoint; default true


@dataclass(frozen=True)
class FirstStageConfig:
    """A first-stage folder, or the checkpoint that holds one with `target` and `params`."""

    ckpt: str | None = None
    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    scale_factor: float | None = field(default=None, metadata=POSITIVE)


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process (`NoiseSchedule`)."""

    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    num_timesteps: int = field(default=1000, metadata=AT_LEAST_ONE)
    beta_start: float = field(default=0.0015, metadata=POSITIVE)
    beta_end: float = field(default=0.0195, metadata=POSITIVE)


@dataclass(frozen=True)
class WarmupConfig:
    """How the pool is filled: `ancestral` walks every slot; `ddim` noises samples to random t."""

    mode: Literal["ancestral", "ddim"] = "ancestral"
    steps: int = field(default=50, metadata=AT_LEAST_ONE)  # DDIM steps per sample
    images: int = field(default=1000, metadata=AT_LEAST_ONE)  # DDIM samples
    batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    t_cap: float | None = field(default=None, metadata=POSITIVE)  # `ddim` only: see NoiseSchedule.timesteps_at


@dataclass(frozen=True)
class LossConfig:
    """The space in which the squared error counts, and a cap on the weight that this means per t."""

    space: Literal["eps", "v", "x0"] = "eps"
    weight_cap: float | None = field(default=None, metadata=POSITIVE)


@dataclass(frozen=True)
class DistillConfig:
    """Dynamic iterative distillation; the pool has round(rho * T) * batch_size slots."""

    batch_size: int = field(metadata=AT_LEAST_ONE)
    rho: float = field(metadata=POSITIVE)
    stride: int = field(default=1, metadata=AT_LEAST_ONE)
    pool_dtype: Literal["float16", "float32"] = "float16"
    pool_storage: Literal["memory", "mmap"] = "memory"
    loss: LossConfig = field(default_factory=LossConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)


@dataclass(frozen=True)
class TrainerConfig:
    """Optimisation and hardware."""

    max_steps: int = field(metadata=AT_LEAST_ONE)
    learning_rate: float = field(metadata=POSITIVE)
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup: int = field(default=0, metadata=NOT_NEGATIVE)
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    grad_clip: float | None = field(default=None, metadata=POSITIVE)
    ema_decay: float = field(default=0.9999, metadata={"min": 0, "below": 1})
    precision: Literal["auto", "bf16", "32"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int = field(default=1, metadata=AT_LEAST_ONE)
    seed: int = field(default=0, metadata=NOT_NEGATIVE)


@dataclass(frozen=True)
class LoggingConfig:
    """Where a run writes and how often, in training steps."""

    dir: str = "logs"
    name: str | None = None  # default: the name of the last --base file
    save_every: int = field(default=5000, metadata=AT_LEAST_ONE)
    sample_every: int = field(default=5000, metadata=AT_LEAST_ONE)
    sample_count: int = field(default=16, metadata=AT_LEAST_ONE)
    sample_steps: int = field(default=50, metadata=AT_LEAST_ONE)  # DDIM
    export_dtype: Literal["float32", "float16"] = "float32"  # of the model's folder


@dataclass(frozen=True)
class DistillRun:
    """What `scripts/dkdm_ldm.py` reads."""

    teacher: TeacherConfig
    student: NetworkConfig
    distill: DistillConfig
    trainer: TrainerConfig
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    diffusion: DiffusionConfig | None = None
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(frozen=True)
class DataConfig:
    """Training images: a folder or an ADM-style .npz, and an optional held-out set."""

    path: str
    image_size: int = field(metadata=AT_LEAST_ONE)
    batch_size: int = field(metadata=AT_LEAST_ONE)
    held_out: str | None = None
    flip: bool = True
    t_cap: float | None = field(
        default=None, metadata=POSITIVE
    )  # see NoiseSchedule.timesteps_at; diffusion models only


@dataclass(frozen=True)
class DiffusionRun:
    """What `scripts/train_ldm.py` reads: Alg. 2 in latent space."""

    model: NetworkConfig
    first_stage: FirstStageConfig
    diffusion: DiffusionConfig
    data: DataConfig
    trainer: TrainerConfig
    loss: LossConfig = field(default_factory=LossConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(frozen=True)
class FirstStageLoss:
    """Weights of the first stage's loss; 0 leaves a term out."""

    l1: float = field(default=1.0, metadata=NOT_NEGATIVE)
    l2: float = field(default=1.0, metadata=NOT_NEGATIVE)
    color: float = field(default=0.0, metadata=NOT_NEGATIVE)  # L1 between 8x8 pixel averages
    codebook: float = field(default=1.0, metadata=NOT_NEGATIVE)
    adversarial: float = field(default=0.0, metadata=NOT_NEGATIVE)
    adversarial_start: int = field(default=0, metadata=NOT_NEGATIVE)
    perceptual: float = field(default=0.0, metadata=NOT_NEGATIVE)
    perceptual_backbone: str | None = None  # local file: torchvision's VGG16 weights, for LPIPS


@dataclass(frozen=True)
class CodebookConfig:
    """How the codebook comes to life."""

    continuous_steps: int = field(default=500, metadata=AT_LEAST_ONE)
    restart_every: int = field(default=100, metadata=AT_LEAST_ONE)


@dataclass(frozen=True)
class FirstStageRun:
    """What `scripts/train_first_stage.py` reads."""

    first_stage: FirstStageConfig
    data: DataConfig
    trainer: TrainerConfig
    loss: FirstStageLoss = field(default_factory=FirstStageLoss)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    hue: float = field(default=0.0, metadata={"min": 0, "max": 0.5})
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(frozen=True)
class FirstStagePointer:
    """Where a model's first stage lies, relative to the model's folder; what it is, if it is no folder of ours."""

    path: str
    scale_factor: float = field(metadata=POSITIVE)
    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelCard:
    """config.yaml of a student's or teacher's folder: it describes itself."""

    weights: str
    network: NetworkConfig
    diffusion: DiffusionConfig
    first_stage: FirstStagePointer | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstStageCard:
    """config.yaml of a first stage's folder."""

    weights: str
    target: str
    params: dict[str, Any]
    scale_factor: float = field(default=1.0, metadata=POSITIVE)
    info: dict[str, Any] = field(default_factory=dict)
