"""The sections of a configuration and what each key may hold."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
class NewNetworkConfig(NetworkConfig):
    """A network to train, and its first weights: `random` or those of a model folder."""

    init: str = "random"


@dataclass(frozen=True)
class StudentConfig(NewNetworkConfig):
    """The student: `target` and `params`, or a `budget` of parameters for a narrower UNet of the teacher's shape.

    `init: teacher` begins with slices of the teacher's tensors.
    """

    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    budget: str | int | None = None  # 60M


@dataclass(frozen=True)
class TeacherConfig:
    """A model folder (it describes itself), or a foreign checkpoint with `target` and `params`."""

    ckpt: str
    target: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    parameterization: Literal["eps", "v"] | None = None  # of a foreign checkpoint; default eps
    use_ema: bool | None = None  # of a foreign checkpoint; default true
    guidance: float = field(default=1.0, metadata=NOT_NEGATIVE)  # classifier-free, of a class-conditional teacher
    null_label: int | None = field(default=None, metadata=NOT_NEGATIVE)  # that means none; a DiT knows its own
    licence: str | None = None  # of its weights, for the student's card
    check: bool = True  # before a distillation: does the teacher denoise its own samples?


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
    space: Literal["latent", "pixel"] = "latent"  # pixel: no first stage, x_0 in [-1,1], variance may be learned


@dataclass(frozen=True)
class WarmupConfig:
    """How the pool is filled: `ancestral` walks every slot, `ddim` and `dpm-solver++` noise samples to random t."""

    mode: Literal["ancestral", "ddim", "dpm-solver++", "noise"] = "ancestral"  # noise: nothing prepared, all at T
    steps: int = field(default=50, metadata=AT_LEAST_ONE)  # per sample
    images: int = field(default=1000, metadata=AT_LEAST_ONE)  # samples of the teacher
    batch_size: int = field(default=64, metadata=AT_LEAST_ONE)
    t_cap: float | None = field(default=None, metadata=POSITIVE)  # of samples: see NoiseSchedule.timesteps_at


@dataclass(frozen=True)
class LossConfig:
    """The space in which the squared error counts, a cap on the weight that this means per t, and lambda."""

    space: Literal["eps", "v", "x0"] = "eps"
    weight_cap: float | None = field(default=None, metadata=POSITIVE)
    vlb_weight: float = field(default=1.0, metadata=NOT_NEGATIVE)  # lambda, where the variance is learned


@dataclass(frozen=True)
class DistillConfig:
    """Iterative distillation; the pool of `dynamic` has round(rho * T) * batch_size slots, others have batch_size."""

    batch_size: int = field(metadata=AT_LEAST_ONE)
    variant: Literal["dynamic", "shuffled", "iterative"] = "dynamic"
    rho: float | None = field(default=None, metadata=POSITIVE)  # `dynamic` needs it, the others have no use for it
    discard: float = field(default=0.0, metadata={"min": 0, "below": 1})  # share of batches that nobody sees
    input_perturbation: float = field(default=0.0, metadata=NOT_NEGATIVE)  # gamma of DDPM-IP
    stride: int = field(default=1, metadata=AT_LEAST_ONE)
    pool_dtype: Literal["float16", "float32"] = "float16"
    pool_storage: Literal["memory", "mmap"] = "memory"
    pool_from: str | None = None  # a pool cache or checkpoint of the reference implementation, instead of a warm-up
    loss: LossConfig = field(default_factory=LossConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)


@dataclass(frozen=True)
class EarlyStopConfig:
    """Stop when a figure's mean over `window` steps has not fallen for `patience` windows."""

    monitor: Literal["loss", "eps_mse"] = "loss"
    window: int = field(default=1000, metadata=AT_LEAST_ONE)
    patience: int = field(default=10, metadata=AT_LEAST_ONE)
    min_delta: float = field(default=0.0, metadata=NOT_NEGATIVE)


@dataclass(frozen=True)
class TrainerConfig:
    """Optimisation and hardware."""

    max_steps: int = field(metadata=AT_LEAST_ONE)
    learning_rate: float = field(metadata=POSITIVE)
    max_minutes: float | None = field(default=None, metadata=POSITIVE)  # of training; it ends a run that takes longer
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_warmup: int = field(default=0, metadata=NOT_NEGATIVE)
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    grad_clip: float | None = field(default=None, metadata=POSITIVE)
    accumulate: int = field(default=1, metadata=AT_LEAST_ONE)  # batches a step
    early_stop: EarlyStopConfig | None = None
    ema_decay: float = field(default=0.9999, metadata={"min": 0, "below": 1})
    precision: Literal["auto", "bf16", "32"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    devices: int = field(default=1, metadata=AT_LEAST_ONE)
    seed: int = field(default=0, metadata=NOT_NEGATIVE)


@dataclass(frozen=True)
class LoggingConfig:
    """Where a run writes and how often, in training steps."""

    dir: str = "logs"
    name: str | None = None  # default: the names of the --base files
    save_every: int = field(default=5000, metadata=AT_LEAST_ONE)
    sample_every: int = field(default=5000, metadata=AT_LEAST_ONE)
    sample_count: int = field(default=16, metadata=AT_LEAST_ONE)
    sample_steps: int = field(default=50, metadata=AT_LEAST_ONE)  # DDIM
    export_dtype: Literal["float32", "float16"] = "float32"  # of the model's folder


@dataclass(frozen=True)
class DistillRun:
    """What `scripts/dkdm_ldm.py` reads."""

    SCRIPT: ClassVar[str] = "dkdm_ldm.py"
    teacher: TeacherConfig
    student: StudentConfig
    distill: DistillConfig
    trainer: TrainerConfig
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    diffusion: DiffusionConfig | None = None
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training images: a folder or an ADM-style .npz, and an optional held-out set."""

    path: str
    image_size: int = field(metadata=AT_LEAST_ONE)
    batch_size: int = field(metadata=AT_LEAST_ONE)
    held_out: str | None = None
    flip: bool = True


@dataclass(frozen=True, kw_only=True)
class DiffusionDataConfig:
    """Data-based: `path`; data-free: `synthetic`; data-limited: both, with a `fraction` of `path` (Sec. 4.1)."""

    path: str | None = None  # real images: a folder or an ADM-style .npz
    fraction: float = field(default=1.0, metadata={"above": 0, "max": 1})  # of the images in `path`, chosen by the seed
    synthetic: str | None = None  # a teacher's samples: txt-free_sample.py --npz
    image_size: int = field(metadata=AT_LEAST_ONE)
    batch_size: int = field(metadata=AT_LEAST_ONE)
    flip: bool = True
    cache: bool = True  # encode once before the training, not in every step
    t_cap: float | None = field(default=None, metadata=POSITIVE)  # see NoiseSchedule.timesteps_at


@dataclass(frozen=True)
class DiffusionRun:
    """What `scripts/train_ldm.py` reads: Alg. 2 in latent or pixel space."""

    SCRIPT: ClassVar[str] = "train_ldm.py"
    model: NewNetworkConfig
    diffusion: DiffusionConfig
    data: DiffusionDataConfig
    trainer: TrainerConfig
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
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

    SCRIPT: ClassVar[str] = "train_first_stage.py"
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

    KIND: ClassVar[str] = "a diffusion model's folder"
    weights: str
    network: NetworkConfig
    diffusion: DiffusionConfig
    first_stage: FirstStagePointer | None = None
    null_label: int | None = None  # that means none, where the network's table has one and does not say so itself
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstStageCard:
    """config.yaml of a first stage's folder."""

    KIND: ClassVar[str] = "a first stage's folder"
    weights: str
    target: str
    params: dict[str, Any]
    scale_factor: float = field(default=1.0, metadata=POSITIVE)
    info: dict[str, Any] = field(default_factory=dict)
