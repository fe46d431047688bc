"""Parts out of a validated configuration: teacher, first stage, student, and whether they fit together."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ldm_dkdm.checkpoints import compvis, read_tensors
from ldm_dkdm.checkpoints.folder import is_model_folder, read_folder
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.config import build
from ldm_dkdm.denoiser import Denoiser
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.networks import UNet
from ldm_dkdm.networks.scaling import parse_budget, slice_teacher, unet_within_budget
from ldm_dkdm.pixel import IdentityCodec, PixelDenoiser
from ldm_dkdm.schema import (
    DiffusionConfig,
    DistillRun,
    FirstStageCard,
    FirstStageConfig,
    FirstStagePointer,
    LossConfig,
    ModelCard,
    NetworkConfig,
    NewNetworkConfig,
    StudentConfig,
)
from ldm_dkdm.teacher import Teacher, class_labels

Codec = LatentCodec | IdentityCodec


@dataclass(frozen=True)
class Model:
    """A denoising network with all that is needed to sample from it."""

    network: nn.Module
    card: ModelCard
    first_stage: Path | None  # folder or checkpoint; None where the model has no pointer to one

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C,H,W) of the states."""
        return self.network.in_channels, self.network.image_size, self.network.image_size

    @property
    def denoiser(self) -> type[Denoiser]:
        """How the network's output is read."""
        return PixelDenoiser if self.card.diffusion.space == "pixel" else Denoiser

    @property
    def classes(self) -> list[int] | None:
        """The labels that it takes; None for an unconditional model."""
        return class_labels(self.network, self.card.null_label)

    def as_teacher(self, precision: str, guidance: float = 1.0, null_label: int | None = None) -> Teacher:
        """The model as a frozen predictor."""
        schedule, parameterization = make_schedule(self.card.diffusion), self.card.network.parameterization
        null_label = self.card.null_label if null_label is None else null_label
        return Teacher(self.network, schedule, parameterization, precision, self.denoiser, guidance, null_label)


def make_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """The forward process that a config section describes."""
    return NoiseSchedule(config.schedule, config.num_timesteps, config.beta_start, config.beta_end)


def load_model(folder: Path) -> Model:
    """Read a student's or teacher's folder."""
    card, tensors = read_folder(folder, ModelCard)
    network = build(card.network, f"{folder}/config.yaml: network.params")
    load_strictly(network, tensors, folder / card.weights)
    pointer = folder / card.first_stage.path if card.first_stage else None
    return Model(network, card, pointer)


def load_teacher(config: DistillRun, planning: bool = False) -> Model:
    """The teacher of a distillation: a model folder of ours, or a foreign checkpoint with target and params.

    While `planning`, a checkpoint that is not there yet is no error: the weights stay random.
    """
    teacher = config.teacher
    path = Path(teacher.ckpt)
    if is_model_folder(path):
        for key in ("target", "params", "parameterization", "use_ema"):
            if getattr(teacher, key) not in (None, {}):
                raise UserError(f"teacher.{key}: {path} describes itself; remove the key")
        model = load_model(path)
        if config.diffusion not in (None, model.card.diffusion):
            raise UserError(f"diffusion: {config.diffusion} differs from the teacher's own {model.card.diffusion}")
        return model
    missing = not path.is_file()
    if missing and not (planning and teacher.target):
        raise UserError(f"teacher.ckpt: {path} is missing; {how_to_get(path)}")
    if teacher.target is None or config.diffusion is None:
        raise UserError(
            f"teacher: {path} is no model folder of ours, so teacher.target, teacher.params and diffusion must be given"
        )
    node = NetworkConfig(teacher.target, teacher.params, teacher.parameterization or "eps")
    network = build(node, "teacher.params")
    check_network(network, config.diffusion, "teacher.params")
    if not missing:
        _load_foreign(network, config, path)
    card = ModelCard(path.name, node, config.diffusion, null_label=teacher.null_label)
    return Model(network, card, path if config.diffusion.space == "latent" else None)


def _load_foreign(network: nn.Module, config: DistillRun, path: Path) -> None:
    tensors = read_tensors(path)
    if config.diffusion.space == "pixel":  # guided-diffusion's and DDPM-IP's files: one bare set of weights
        load_strictly(network, tensors, path)
    else:
        compvis.check_schedule(tensors, make_schedule(config.diffusion), path)
        compvis.load_unet(network, tensors, config.teacher.use_ema is not False, path)


LARGEST_WEIGHT = 1e4  # of a step in the loss; LDM's schedule has 200

RELEASES = {
    "ffhq256": "CompVis's LDM-VQ-4 release for FFHQ (ffhq.zip), unpack its model.ckpt",
    "celebahq256": "CompVis's LDM-VQ-4 release for CelebA-HQ (celeba.zip), unpack its model.ckpt",
    "cifar10": "DDPM-IP's release ADM_cifar10_baseline.pt",
    "celeba64": "DDPM-IP's release DDPM_IP_celeba64.pt",
    "imagenet32": "DDPM-IP's release DDPM_IP_imageNet32.pt",
}


def how_to_get(path: Path) -> str:
    """What to put where a checkpoint is expected."""
    release = RELEASES.get(path.parent.name)
    if release:
        return f"download {release} and put it there, or set teacher.ckpt=PATH"
    return "set the key to a CompVis .ckpt, a guided-diffusion .pt, or a model folder with config.yaml and weights"


def load_first_stage(
    config: FirstStageConfig, model: Model, precision: str, planning: bool = False
) -> tuple[Codec, FirstStagePointer | None]:
    """The codec of a model, and the pointer to it with an absolute path; pixel space has no pointer.

    While `planning`, a first stage that is not there yet keeps random weights.
    """
    if model.card.diffusion.space == "pixel":
        if config != FirstStageConfig():
            raise UserError("first_stage: pixel space has none; remove the section, or set diffusion.space=latent")
        return IdentityCodec(), None
    path = Path(config.ckpt) if config.ckpt else model.first_stage
    if path is None:
        raise UserError("first_stage.ckpt: missing; the model has no pointer to its first stage")
    known = model.card.first_stage
    if known:  # the scale belongs to the diffusion model, whichever file its first stage comes from
        scale = config.scale_factor or known.scale_factor
        source = config if config.ckpt else known
        config = FirstStageConfig(config.ckpt, source.target, source.params, scale)
    if planning and config.target and not path.exists():
        codec = LatentCodec(build(config, "first_stage.params"), config.scale_factor or 1.0, precision)
    else:
        codec = load_codec(path, config, precision)
    if codec.latent_channels != model.latent_shape[0]:
        raise UserError(
            f"first_stage: {path} has {codec.latent_channels} latent channels, the model has {model.latent_shape[0]}"
        )
    if codec.latent_size != model.latent_shape[1]:
        raise UserError(
            f"first_stage: {path} makes latents of side {codec.latent_size}, the model has {model.latent_shape[1]}"
        )
    return codec, FirstStagePointer(str(path.resolve()), codec.scale_factor, config.target, config.params)


def load_codec(path: Path, config: FirstStageConfig, precision: str = "32") -> LatentCodec:
    """The codec in a first-stage folder, or in a checkpoint whose architecture `config` gives."""
    if is_model_folder(path):
        if config.target is not None or config.params:
            raise UserError(f"first_stage.target: {path} describes itself; remove target and params")
        card, tensors = read_folder(path, FirstStageCard)
        vq = build(card, f"{path}/config.yaml: params")
        load_strictly(vq, tensors, path / card.weights)
        return LatentCodec(vq, config.scale_factor or card.scale_factor, precision)
    if not path.is_file():
        raise UserError(f"first_stage: {path} is missing; name a first-stage folder (config.yaml and weights)")
    if config.target is None:
        raise UserError(f"first_stage: {path} is no first-stage folder, so first_stage.target and params must be given")
    vq = build(config, "first_stage.params")
    tensors = read_tensors(path)
    if any(name.startswith(compvis.FIRST_STAGE) for name in tensors):
        compvis.load_first_stage(vq, tensors, path)
    else:
        load_strictly(vq, {k: v for k, v in tensors.items() if not k.startswith("loss.")}, path)
    return LatentCodec(vq, config.scale_factor or _stored_scale(tensors), precision)


def _stored_scale(tensors: dict[str, Tensor]) -> float:
    return float(tensors["scale_factor"]) if "scale_factor" in tensors else 1.0


def make_student(config: StudentConfig, teacher: Model) -> tuple[nn.Module, NetworkConfig]:
    """The student with its first weights, and what its card says of it; its states have the teacher's shape."""
    node = student_node(config, teacher)
    student = build(node, "student.params")
    for key in ("in_channels", "image_size"):
        own, teachers = getattr(student, key), getattr(teacher.network, key)
        if own != teachers:
            raise UserError(f"student.params.{key}: {own} differs from the teacher's {teachers}")
    check_network(student, teacher.card.diffusion, "student.params")
    classes = teacher.network.num_classes
    if student.num_classes not in (None, classes):
        raise UserError(f"student.params.num_classes: {student.num_classes} differs from the teacher's {classes}")
    if student.out_channels > teacher.network.out_channels:
        raise UserError("student.params.out_channels: the teacher has no variance to teach; set it to in_channels")
    if config.init == "teacher":
        print(slice_teacher(student, teacher.network))
    else:
        load_initial(student, config, "student.init")
    return student, node


def student_node(config: StudentConfig, teacher: Model) -> NetworkConfig:
    """The student's network as configured, or the teacher's UNet narrowed to the budget."""
    if config.budget is None:
        if config.target is None:
            raise UserError("student.target: missing; name a network and its params, or set student.budget=60M")
        return plain(config)
    if config.target is not None or config.params:
        raise UserError("student.budget: chooses target and params itself; remove them or the budget")
    node = teacher.card.network
    if not isinstance(teacher.network, UNet):
        raise UserError("student.budget: narrows a UNet, and this teacher is none; set student.target and params")
    params = unet_within_budget(node.params, parse_budget(config.budget))
    print(f"student.budget {config.budget}: model_channels {params['model_channels']}")
    return NetworkConfig("ldm_dkdm.networks.UNet", params, config.parameterization)


def plain(node: NetworkConfig) -> NetworkConfig:
    """What a model's card says of its network: not how its training began."""
    return NetworkConfig(node.target, node.params, node.parameterization)


def load_initial(network: nn.Module, node: NewNetworkConfig, where: str) -> None:
    """Give a network its first weights: as they are (`random`), or those in a model folder."""
    init = node.init
    if init == "random":
        return
    if not is_model_folder(Path(init)):
        raise UserError(f"{where}: '{init}' is neither 'random' nor a model folder with config.yaml and weights")
    card, tensors = read_folder(Path(init), ModelCard)
    found = card.network.parameterization
    if found != node.parameterization:
        raise UserError(f"{where}: {init} predicts {found}; set parameterization to that, or init to random")
    load_strictly(network, tensors, Path(init) / card.weights)


def check_network(network: nn.Module, diffusion: DiffusionConfig, where: str) -> None:
    """Refuse outputs that the space has no use for."""
    states = network.in_channels
    allowed = (states, 2 * states) if diffusion.space == "pixel" else (states,)
    if network.out_channels not in allowed:
        raise UserError(
            f"{where}.out_channels: {network.out_channels} must be {' or '.join(map(str, allowed))} in "
            f"{diffusion.space} space{' (learn_sigma: false)' if hasattr(network, 'null_label') else ''}"
        )


def check_loss(loss: LossConfig, schedule: NoiseSchedule, where: str) -> None:
    """Refuse a cap that would do nothing, and weights that would leave nothing but the noisiest steps."""
    if loss.space == "eps" and loss.weight_cap is not None:
        raise UserError(f"{where}.weight_cap: has no effect with space: eps; remove it or choose v or x0")
    largest = 1 / schedule.alphas_cumprod[-1].item()
    if loss.space != "eps" and loss.weight_cap is None and largest > LARGEST_WEIGHT:
        raise UserError(
            f"{where}.weight_cap: with space: {loss.space} this schedule weighs the last step {largest:.1e} times; "
            "set a cap, for example 10"
        )
