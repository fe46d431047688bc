"""Parts out of a validated configuration: teacher, first stage, student, and whether they fit together."""

import math
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ldm_dkdm.checkpoints import compvis, read_tensors
from ldm_dkdm.checkpoints.diffusers_folder import (
    FirstStage,
    is_diffusers_component,
    is_pipeline,
    read_first_stage,
    read_pipeline,
)
from ldm_dkdm.checkpoints.folder import home_of, is_model_folder, read_folder
from ldm_dkdm.checkpoints.inference import infer_first_stage
from ldm_dkdm.checkpoints.loading import build_loaded, load_strictly
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import (
    FirstStageCard,
    FirstStageConfig,
    FirstStagePointer,
    LossConfig,
    ModelCard,
    NetworkConfig,
    NewNetworkConfig,
    StudentConfig,
)
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.first_stage.codec import LatentCodec
from ldm_dkdm.networks import NETWORKS, DiT, UNet
from ldm_dkdm.networks.scaling import parse_budget, slice_teacher, unet_within_budget
from ldm_dkdm.pixel import IdentityCodec
from ldm_dkdm.sources import Model, check_network, how_to_get, load_model, open_model

Codec = LatentCodec | IdentityCodec
LARGEST_WEIGHT = 1e4  # of a step in the loss; LDM's schedule has 200


def load_first_stage(
    config: FirstStageConfig, model: Model, precision: str, planning: bool = False
) -> tuple[Codec, FirstStagePointer | None]:
    """The codec of a model, and the pointer to it with an absolute path; pixel space has no pointer.

    While `planning`, a first stage that is not there yet keeps random weights.
    """
    if not model.space.encoded:
        if config != FirstStageConfig():
            raise UserError("first_stage: pixel space has none; remove the section, or set diffusion.space=latent")
        return IdentityCodec(), None
    path = home_of(Path(config.ckpt)) if config.ckpt else model.first_stage
    if path is None:
        raise UserError("first_stage.ckpt: missing; the model has no pointer to its first stage")
    known = model.card.first_stage
    if known:  # the scale belongs to the diffusion model, whichever file its first stage comes from
        scale = config.scale_factor or known.scale_factor
        source = config if config.ckpt else known
        config = FirstStageConfig(config.ckpt, source.target, source.params, scale)
    if planning and config.target and not path.exists():
        codec = LatentCodec(build(config, FIRST_STAGES, "first_stage.params"), config.scale_factor or 1.0, precision)
    else:
        codec, config = _codec_and_config(path, config, precision, model.latent_shape[1])
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
    return _codec_and_config(home_of(path), config, precision, None)[0]


def _codec_and_config(
    path: Path, config: FirstStageConfig, precision: str, latent_size: int | None
) -> tuple[LatentCodec, FirstStageConfig]:
    """The codec, and the config completed by what a file tells once the side of its latents is known."""
    if is_model_folder(path):
        if config.target is not None or config.params:
            raise UserError(f"first_stage.target: {path} describes itself; remove target and params")
        card, tensors = read_folder(path, FirstStageCard)
        vq = build_loaded(card, f"{path}/config.yaml: params", FIRST_STAGES, tensors, path / card.weights)
        return LatentCodec(vq, config.scale_factor or card.scale_factor, precision), config
    if is_pipeline(path):
        return _pipeline_codec(path, config, precision), config
    if is_diffusers_component(path):
        stage = read_first_stage(path, latent_size)
        return _stage_codec(stage, path, config, precision), replace(config, target=stage.target, params=stage.params)
    if not path.is_file():
        raise UserError(f"first_stage.ckpt: {path} is missing; {how_to_get(path, 'first_stage.ckpt')}")
    if config.target is None and latent_size is None:
        raise UserError(f"first_stage: {path} is no first-stage folder, so first_stage.target and params must be given")
    tensors = read_tensors(path)
    found = compvis.first_stage_tensors(tensors) or {k: v for k, v in tensors.items() if not k.startswith("loss.")}
    if config.target is None:
        target, params = infer_first_stage(found, latent_size, path)
        config = replace(config, target=target, params=params)
    vq = build_loaded(config, "first_stage.params", FIRST_STAGES, found, path)
    return LatentCodec(vq, config.scale_factor or _stored_scale(tensors.get("scale_factor"), path), precision), config


def _stored_scale(stored: Tensor | None, path: Path) -> float:
    """The scale of the latents in a CompVis checkpoint; 1 where it stores none."""
    if stored is None:
        return 1.0
    if stored.numel() != 1 or not stored.is_floating_point() or not 0 < stored.item() < math.inf:
        raise UserError(f"{path}: scale_factor is no number above 0; set first_stage.scale_factor")
    return stored.item()


def _pipeline_codec(path: Path, config: FirstStageConfig, precision: str) -> LatentCodec:
    stage = read_pipeline(path).first_stage
    if stage is None:
        raise UserError(f"first_stage: {path} is a pixel-space pipeline, without a first stage")
    return _stage_codec(stage, path, config, precision)


def _stage_codec(stage: FirstStage, path: Path, config: FirstStageConfig, precision: str) -> LatentCodec:
    """The codec of diffusers' first stage."""
    node = {"target": stage.target, "params": stage.params}
    vq = build_loaded(node, "first_stage.params", FIRST_STAGES, stage.tensors, path)
    return LatentCodec(vq, config.scale_factor or stage.scale_factor, precision)


def make_student(config: StudentConfig, teacher: Model) -> tuple[nn.Module, NetworkConfig]:
    """The student with its first weights, and what its card says of it; its states have the teacher's shape."""
    node = student_node(config, teacher)
    student = build(node, NETWORKS, "student.params")
    if config.budget is not None:
        millions = sum(p.numel() for p in student.parameters()) / 1e6
        width = node.params["model_channels"]
        print(f"student.budget {config.budget}: model_channels {width}, {millions:.3g} M parameters")
    for key in ("in_channels", "image_size"):
        own, teachers = getattr(student, key), getattr(teacher.network, key)
        if own != teachers:
            name = "input_size" if key == "image_size" and isinstance(student, DiT) else key
            raise UserError(f"student.params.{name}: {own} differs from the teacher's {teachers}")
    check_network(student, "student.params")
    classes = teacher.network.num_classes
    if student.num_classes not in (None, classes):
        raise UserError(f"student.params.num_classes: {student.num_classes} differs from the teacher's {classes}")
    if student.out_channels > teacher.network.out_channels:
        raise UserError(
            f"student.params.out_channels: {student.out_channels}, but the teacher has no variance to teach; "
            + ("set learn_sigma: false" if isinstance(student, DiT) else f"set it to {student.in_channels}")
        )
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
    return NetworkConfig("ldm_dkdm.networks.UNet", params, config.parameterization)


def plain(node: NetworkConfig) -> NetworkConfig:
    """What a model's card says of its network: not how its training began."""
    return NetworkConfig(node.target, node.params, node.parameterization)


def load_initial(network: nn.Module, node: NewNetworkConfig, where: str) -> None:
    """Give a network its first weights: as they are (`random`), or those in a model folder."""
    init = node.init
    if init == "random":
        return
    home = home_of(Path(init))
    if not is_model_folder(home):
        words = "random nor teacher" if isinstance(node, StudentConfig) else "random"
        raise UserError(f"{where}: '{init}' is neither {words} nor a model folder with config.yaml and weights")
    card, tensors = read_folder(home, ModelCard)
    found = card.network.parameterization
    if found != node.parameterization:
        raise UserError(f"{where}: {init} predicts {found}; set parameterization to that, or init to random")
    load_strictly(network, tensors, home / card.weights)


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


def find_model(path: Path, raw: bool = False) -> tuple[Model, Path]:
    """The model at a run folder, a model folder or a training checkpoint, and the folder it lives in.

    `raw`: the weights of a training checkpoint as the optimizer left them, not their EMA.
    """
    if raw and path.suffix != ".ckpt":
        raise UserError(f"--raw: {path} holds EMA weights only; name a checkpoint in checkpoints/*.ckpt")
    home = home_of(path)
    if home != path:
        return load_model(home), home
    if path.suffix == ".ckpt" and path.is_file():
        return _from_training_checkpoint(path, "current_model_state" if raw else "state_dict")
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the run has no student/ yet; let it save once, or go on with --resume {path}")
    model = open_model(path)
    if model is None:
        raise UserError(
            f"{path}: no run, model folder (config.yaml and weights), training checkpoint, diffusers pipeline or "
            "safetensors of convert.py"
        )
    return model, path


def _from_training_checkpoint(path: Path, part: str) -> tuple[Model, Path]:
    """The weights in a part of a training checkpoint; the run's student folder says what they are."""
    folder = path.parent.parent / "student"
    if not is_model_folder(folder):
        raise UserError(
            f"{path}: no {folder}/config.yaml beside it that says what the weights are, as in a run's checkpoints/; "
            "somebody else's checkpoint is for teacher.ckpt"
        )
    card, _ = read_folder(folder, ModelCard)
    prefix = "network."
    tensors = {k.removeprefix(prefix): v for k, v in read_tensors(path, part).items() if k.startswith(prefix)}
    network = build_loaded(card.network, f"{folder}/config.yaml: network.params", NETWORKS, tensors, path)
    pointer = folder / card.first_stage.path if card.first_stage else None
    return Model(network, card, pointer), folder
