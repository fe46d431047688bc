"""The sections that runs and models share, with the limits and meaning of each key."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from ldm_dkdm.config.checked import Section, key, one_of
from ldm_dkdm.device import world_of
from ldm_dkdm.errors import UserError

PARAMETERIZATIONS = "ldm_dkdm.diffusion.process:PARAMETERIZATIONS"
FIRST_STAGES = "ldm_dkdm.first_stage:FIRST_STAGES"
SAMPLERS = "ldm_dkdm.diffusion.samplers:SAMPLERS"


SCALES: dict[str, Any] = {"min": 1e-4, "max": 1e4, "why": "latents of such a scale overflow or vanish"}


@dataclass(frozen=True)
class NetworkConfig(Section):
    """A network as CompVis writes one: `target` and `params`."""

    target: str = key(help="Name of the network's class, such as `ldm_dkdm.networks.UNet`.")
    params: dict[str, Any] = key(help="Keyword arguments of the network's class.")
    parameterization: str = one_of(PARAMETERIZATIONS, "eps", help="What the network predicts.")

    @property
    def plain(self) -> "NetworkConfig":
        """The network without `init`, as a model card stores it."""
        return NetworkConfig(self.target, self.params, self.parameterization)


@dataclass(frozen=True)
class NewNetworkConfig(NetworkConfig):
    """A network to train."""

    init: str = key("random", path=True, help="Initial weights: `random`, or the path of a model folder.")


@dataclass(frozen=True)
class StudentConfig(NewNetworkConfig):
    """The student: `target` and `params`, or a `budget` of parameters for a narrower UNet of the teacher's shape."""

    target: str | None = key(  # type: ignore[assignment]  # `budget` may stand in for it
        None, help="Name of the student's class; not needed with `budget`."
    )
    params: dict[str, Any] = key(factory=dict, help="Keyword arguments of the student's class.")
    init: str = key(
        "random",
        path=True,
        help="Initial weights: `random`, `teacher` (copies and slices of its tensors), or a model folder's path.",
    )
    budget: str | int | None = key(None, help="Parameters of a narrowed copy of the teacher's UNet, such as `60M`.")


@dataclass(frozen=True)
class TeacherConfig(Section):
    """The teacher: a model that describes itself, or a third-party checkpoint with `target` and `params`."""

    ckpt: str = key(path=True, help="Path of a run folder, a model folder or a checkpoint file.")
    target: str | None = key(None, help="Class of a third-party checkpoint's network, where the file does not show it.")
    params: dict[str, Any] = key(factory=dict, help="Keyword arguments of that class that tensor shapes do not show.")
    parameterization: str | None = one_of(
        PARAMETERIZATIONS, None, help="What the network of a third-party checkpoint predicts; null means eps."
    )
    use_ema: bool | None = key(None, help="Load the EMA weights of a third-party checkpoint; null means true.")
    guidance: float = key(1.0, min=0, help="Classifier-free guidance of a class-conditional teacher; 1 is unguided.")
    null_label: int | None = key(None, min=0, help="Label for no class; a DiT defines its own.")
    licence: str | None = key(None, help="Licence of the teacher's weights, for the student's card.")
    check: bool = key(True, help="Before a distillation, test that the teacher denoises its own samples.")


@dataclass(frozen=True)
class FirstStageConfig(Section):
    """The first stage of a latent model: a folder, or the checkpoint that holds one with `target` and `params`."""

    ckpt: str | None = key(
        None, path=True, help="Path of the first stage; null takes the one that comes with the model."
    )
    target: str | None = one_of(FIRST_STAGES, None, help="Name of the first stage's class.")
    params: dict[str, Any] = key(factory=dict, help="Keyword arguments of that class.")
    scale_factor: float | None = key(None, help="Factor from encoded images to the network's latents.", **SCALES)


@dataclass(frozen=True)
class WarmupConfig(Section):
    """How the pool is filled before the first step."""

    mode: str = one_of(
        "ldm_dkdm.distillation.warmup:WARMUPS",
        "ancestral",
        help="`ancestral` walks every slot from noise to its t; `harvest` walks fewer chains, each of which fills "
        "several slots; `ddim` and `dpm-solver++` add noise to samples of the teacher (`ddim` with 50 steps leaves 6% "
        "too little variance at the lowest t); `noise` starts every slot at T.",
    )
    steps: int = key(50, min=1, help="Sampling steps of each of the teacher's samples; the default is at most T.")
    images: int = key(
        1000,
        min=1,
        max=1e9,
        help="Number of samples of the teacher that are noised, or of chains with `harvest`.",
        why="each fills one slot of the pool or more",
    )
    batch_size: int = key(64, min=1, help="States in one teacher call of the warm-up.")
    t_cap: float | None = key(
        None,
        above=0,
        help="Draws fewer t near pure noise: density min(1, t_cap * abar_t), 0.1 at least; null is uniform.",
    )


@dataclass(frozen=True)
class LossConfig(Section):
    """The student's loss."""

    space: str = one_of(
        "ldm_dkdm.diffusion.objectives:LOSS_SPACES", "eps", help="Quantity whose squared error is the loss."
    )
    weight_cap: float | None = key(
        None, above=0, help="Cap on the weight per t that `v` and `x0` give to the eps error."
    )
    vlb_weight: float = key(1.0, min=0, help="Weight lambda of the variational bound, where the variance is learned.")
    clip_student: bool = key(
        False, help="Clip the student's x_0 in the variational bound, as sampling does; the public code does not."
    )


@dataclass(frozen=True)
class DistillConfig(Section):
    """Iterative distillation: the pool of `dynamic` has round(rho * T) * batch_size slots, others have batch_size."""

    batch_size: int = key(min=1, help="States in a training batch, per device.")
    global_batch_size: int | None = key(
        None, min=1, help="States per step on all devices, which divide it, in place of `batch_size`."
    )
    variant: str = one_of(
        "ldm_dkdm.distillation.stream:VARIANTS",
        "dynamic",
        help="How batches are made; `dynamic` is the method, the others are the paper's comparisons.",
    )
    rho: float | None = key(
        None, above=0, max=1e18, help="Size of the pool of `dynamic`, which needs it; the others do not use it."
    )
    discard: float = key(0.0, min=0, below=1, help="Share of advanced batches that are not shown to the student.")
    discard_mode: Literal["redraw", "same_slots"] = key(
        "redraw", help="After a discarded batch, draw other slots, or advance the same ones (the public code)."
    )
    draws: str = one_of(
        "ldm_dkdm.distillation.draws:DRAWS",
        "uniform",
        help="How `dynamic` draws a batch: `stratified` cuts the pool, sorted by t, into `batch_size` equal parts and "
        "draws a slot from each; `uniform` is the paper's.",
    )
    replay: int = key(
        1,
        min=1,
        max=1000,
        help="Batches in which `dynamic` shows each prediction, mixed with others; the teacher is called once for as "
        "many, and 1 is the paper's.",
        why="the predictions of as many calls are kept on the device",
    )
    input_perturbation: float = key(0.0, min=0, help="Noise added to the student's input: gamma of DDPM-IP.")
    stride: int = key(
        1, min=1, help="Timesteps that a drawn slot advances, more where `t_cap` wants fewer slots; 1 is the paper's."
    )
    pool_dtype: Literal["float16", "float32"] = key("float16", help="Number format of the pool's states.")
    pool_storage: Literal["auto", "device", "memory", "mmap"] = key(
        "auto",
        help="`device` keeps the pool beside the student, `memory` in the host's memory, `mmap` in a file of the run; "
        "`auto` is `device` on a GPU where it takes at most half of the free memory, else `memory`.",
    )
    pool_from: str | None = key(
        None,
        path=True,
        help="Run folder of the same teacher, or a pool cache of the reference, in place of a warm-up.",
    )
    loss: LossConfig = key(factory=LossConfig, help="The student's loss.")
    warmup: WarmupConfig = key(factory=WarmupConfig, help="How the pool is filled before the first step.")


@dataclass(frozen=True)
class EarlyStopConfig(Section):
    """Stop when a figure's mean over `window` steps has not fallen for `patience` windows.

    `agreement` and `x0_drift` are not averaged: a window is one measurement.
    """

    monitor: Literal["loss", "eps_mse", "agreement", "x0_drift"] = key(
        "loss",
        help="Figure that should fall; `agreement` and `x0_drift` are measured every `logging.evaluate_every` steps.",
    )
    window: int = key(1000, min=1, help="Steps over which `loss` or `eps_mse` is averaged.")
    patience: int = key(10, min=1, help="Windows, or measurements, without a fall before the run ends.")
    min_delta: float = key(0.0, min=0, help="Smallest fall that counts.")

    def __post_init__(self) -> None:
        """Refuse a window of a figure that has none."""
        super().__post_init__()
        default = next(f.default for f in fields(self) if f.name == "window")
        if self.measured and self.window != default:
            raise UserError(
                f"window: has no effect with monitor: {self.monitor}, which logging.evaluate_every times; leave it out"
            )

    @property
    def measured(self) -> bool:
        """Whether the figure is one of the agreement's measurements."""
        return self.monitor in ("agreement", "x0_drift")


@dataclass(frozen=True)
class TrainerConfig(Section):
    """Optimisation and hardware."""

    max_steps: int = key(min=1, help="Training steps of the run.")
    learning_rate: float = key(
        above=0,
        max=100,
        help="Learning rate of Adam (AdamW with a weight decay).",
        why="Adam moves every weight by about as much in every step",
    )
    max_minutes: float | None = key(
        None,
        min=0.01,
        help="Minutes of training after which a run ends; null: no limit.",
        why="no run takes its first step in less",
    )
    lr_schedule: Literal["constant", "cosine"] = key(
        "constant", help="`cosine` falls to 0 at the end of the run (steps or minutes)."
    )
    lr_warmup: int = key(0, min=0, help="Steps in which the learning rate rises to its full value.")
    weight_decay: float = key(0.0, min=0, help="Weight decay of AdamW; 0 is Adam.")
    grad_clip: float | None = key(None, above=0, help="Largest norm of the gradient; null does not clip.")
    accumulate: int = key(1, min=1, max=10_000, help="Batches per step.")
    early_stop: EarlyStopConfig | None = key(None, help="End the run when a figure no longer falls.")
    ema_decay: float = key(0.9999, min=0, below=1, help="Decay per step of the averaged weights.")
    ema_warmup: bool = key(
        True,
        help="Begin with a smaller decay, (1 + n) / (10 + n) after n steps, as CompVis; false is constant.",
    )
    precision: str = one_of(
        "ldm_dkdm.device:PRECISIONS",
        "auto",
        help="`auto` is bf16 autocast where the machine has fast bf16, else float32.",
    )
    compile: str = one_of(
        "ldm_dkdm.device:COMPILING",
        "auto",
        help="Compile the networks (torch.compile) before the first step, but not a student that `fsdp` shards; `auto` "
        "does so on a GPU with Triton; `graphs` lets calls of whole batches in a distillation replay graphs of CUDA, "
        "the student's on one device without accumulation.",
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = key("auto", help="Kind of device to train on.")
    devices: int | None = key(
        None,
        min=1,
        max=100_000,
        help="Devices of each machine, each with a pool of its own; null: one for each process that torchrun or srun "
        "started there, else 1.",
    )
    num_nodes: int | None = key(
        None, min=1, max=100_000, help="Machines; null: those on which torchrun or srun started processes, else 1."
    )
    strategy: str = key(
        "auto",
        help="How devices work together, by Lightning's name: `ddp` keeps the student on every device, `fsdp` shards "
        "it; `auto` is `ddp` where there are several.",
    )
    timeout: float = key(
        30.0, min=0.1, max=10_000, help="Minutes that a process waits for the others before it ends the run."
    )
    verify: bool = key(
        True,
        help="Compare teacher, checkpoints and pools with the hashes they were written with; false saves the seconds.",
    )
    seed: int = key(0, min=0, help="Seed of every random choice.")

    @property
    def ranks(self) -> int:
        """The number of processes, one for each device."""
        return self.per_node * self.nodes

    @property
    def per_node(self) -> int:
        """Devices on each machine, by this configuration or by the launcher."""
        return world_of(self.devices, self.num_nodes)[0]

    @property
    def nodes(self) -> int:
        """Machines, by this configuration or by the launcher."""
        return world_of(self.devices, self.num_nodes)[1]
