"""Parts out of a validated configuration: teacher, first stage, student, and whether they fit together."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ldm_dkdm.checkpoints import compvis, read_tensors
from ldm_dkdm.checkpoints.folder import is_model_folder, read_folder
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.config import build
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.schema import (
    DiffusionConfig,
    DistillRun,
    FirstStageCard,
    FirstStageConfig,
    FirstStagePointer,
    LossConfig,
    ModelCard,
    NetworkConfig,
)


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


def load_teacher(config: DistillRun) -> Model:
    """The teacher of a distillation: a model folder of ours, or a CompVis checkpoint with target and params."""
    teacher = config.teacher
    path = Path(teacher.ckpt)
    if is_model_folder(path):
        for key in ("target", "params", "parameterization", "use_ema"):
            if getattr(teacher, key):
                raise UserError(f"teacher.{key}: {path} describes itself; remove the key")
        model = load_model(path)
        if config.diffusion not in (None, model.card.diffusion):
            raise UserError(f"diffusion: {config.diffusion} differs from the teacher's own {model.card.diffusion}")
        return model
    if not path.is_file():
        raise UserError(f"teacher.ckpt: {path} is missing; {how_to_get(path)}")
    if teacher.target is None or config.diffusion is None:
        raise UserError(
            f"teacher: {path} is no model folder of ours, so teacher.target, teacher.params and diffusion must be given"
        )
    node = NetworkConfig(teacher.target, teacher.params, teacher.parameterization or "eps")
    network = build(node, "teacher.params")
    check_network(network, "teacher.params")
    compvis.load_unet(network, read_tensors(path), teacher.use_ema is not False, path)
    return Model(network, ModelCard(path.name, node, config.diffusion), path)


RELEASES = {
    "ffhq256": "CompVis's LDM-VQ-4 release for FFHQ (ffhq.zip)",
    "celebahq256": "CompVis's LDM-VQ-4 release for CelebA-HQ (celeba.zip)",
}


def how_to_get(path: Path) -> str:
    """What to put where a checkpoint is expected."""
    release = RELEASES.get(path.parent.name)
    if release:
        return f"download {release}, unpack its model.ckpt and put it there, or set teacher.ckpt=PATH"
    return "set the key to a CompVis .ckpt file or to a model folder with config.yaml and weights"


def load_first_stage(config: FirstStageConfig, model: Model, precision: str) -> tuple[LatentCodec, FirstStagePointer]:
    """The codec of a model, and the pointer to it with an absolute path."""
    path = Path(config.ckpt) if config.ckpt else model.first_stage
    if path is None:
        raise UserError("first_stage.ckpt: missing; the model has no pointer to its first stage")
    known = model.card.first_stage
    if known:  # the scale belongs to the diffusion model, whichever file its first stage comes from
        scale = config.scale_factor or known.scale_factor
        source = config if config.ckpt else known
        config = FirstStageConfig(config.ckpt, source.target, source.params, scale)
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


def make_student(node: NetworkConfig, teacher: Model) -> nn.Module:
    """The untrained student; its states have the teacher's shape."""
    student = build(node, "student.params")
    for key in ("in_channels", "image_size"):
        own, teachers = getattr(student, key), getattr(teacher.network, key)
        if own != teachers:
            raise UserError(f"student.params.{key}: {own} differs from the teacher's {teachers}")
    check_network(student, "student.params")
    return student


def check_network(network: nn.Module, where: str) -> None:
    """Refuse what latent diffusion has no use for: labels, and outputs beside the prediction."""
    if network.num_classes is not None:
        raise UserError(f"{where}.num_classes: latent diffusion takes no labels here; remove the key")
    if network.out_channels != network.in_channels:
        raise UserError(
            f"{where}.out_channels: {network.out_channels} must equal in_channels "
            f"({network.in_channels}) in latent space"
        )


def check_loss(loss: LossConfig, where: str) -> None:
    """Refuse a cap that would do nothing."""
    if loss.space == "eps" and loss.weight_cap is not None:
        raise UserError(f"{where}.weight_cap: has no effect with space: eps; remove it or choose v or x0")
