"""Where a teacher comes from: a model folder, a diffusers folder, or a checkpoint of another code base."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor, nn

from ldm_dkdm.checkpoints import compvis, read_tensors
from ldm_dkdm.checkpoints.diffusers_folder import is_pipeline, read_pipeline
from ldm_dkdm.checkpoints.export import read_description
from ldm_dkdm.checkpoints.folder import home_of, is_model_folder, read_folder
from ldm_dkdm.checkpoints.foreign import NAMES, Foreign, open_foreign
from ldm_dkdm.checkpoints.loading import build_loaded
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionConfig, DistillRun, ModelCard, NetworkConfig, TeacherConfig
from ldm_dkdm.denoiser import Denoiser
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, blaming, naming
from ldm_dkdm.networks import NETWORKS
from ldm_dkdm.pixel import SPACES, Space
from ldm_dkdm.teacher import Teacher, class_labels


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
    def space(self) -> Space:
        """What the states are."""
        return SPACES[self.card.diffusion.space]

    @property
    def denoiser(self) -> type[Denoiser]:
        """How the network's output is read."""
        return self.space.denoiser

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
    steps_offset = SPACES[config.space].steps_offset
    return NoiseSchedule(config.schedule, config.num_timesteps, config.beta_start, config.beta_end, steps_offset)


def load_model(folder: Path) -> Model:
    """Read a student's or teacher's folder."""
    card, tensors = read_folder(folder, ModelCard)
    where = f"{folder}/config.yaml: network.params"
    network = build_loaded(card.network, where, NETWORKS, tensors, folder / card.weights)
    pointer = folder / card.first_stage.path if card.first_stage else None
    return Model(network, card, pointer)


def open_model(path: Path) -> Model | None:
    """A model that describes itself: a folder of ours, a diffusers pipeline, what `convert.py --to safetensors` wrote.

    None where the path is none of these.
    """
    if is_model_folder(path):
        return load_model(path)
    if is_pipeline(path):
        pipeline = read_pipeline(path)
        return _model(pipeline.network, pipeline.tensors, pipeline.diffusion, TeacherConfig(str(path)), path)
    described = read_description(path) if path.is_file() else None
    return None if described is None else _described(described, path)


def _described(card: ModelCard, path: Path) -> Model:
    """A safetensors file with a card in its metadata; it does not say where its first stage lies."""
    network = build_loaded(card.network, f"{path}: params", NETWORKS, read_tensors(path), path)
    check_network(network, f"{path}: params")
    return Model(network, card, None)


def load_teacher(config: DistillRun, planning: bool = False) -> Model:
    """The teacher of a distillation: a model folder of ours, or somebody else's checkpoint.

    What the checkpoint tells about its architecture and schedule need not be configured. While `planning`, a
    checkpoint that is not there yet is no error where target, params and diffusion are: the weights stay random.

    Raises:
        UserError: a missing or unreadable file, one that holds something else, or one that does not tell all.
    """
    teacher, path = config.teacher, home_of(Path(config.teacher.ckpt))
    if is_model_folder(path):
        return _own_folder(config, path)
    if is_pipeline(path):
        return _pipeline(config, path)
    if not path.is_file():
        if not (planning and teacher.target and config.diffusion):
            raise UserError(f"teacher.ckpt: {path} is missing; {how_to_get(path)}")
        node = NetworkConfig(teacher.target, teacher.params, teacher.parameterization or "eps")
        return _model(node, {}, config.diffusion, teacher, path, load=False)
    with naming("teacher.ckpt"), blaming(path):
        described = read_description(path)
        foreign = open_foreign(path) if described is None else None
    if described is not None:
        _refuse_descriptions(teacher, path)
        _same_diffusion(config, described.diffusion)
        return _described(described, path)
    node = _network(teacher, foreign)
    return _model(node, foreign.weights(teacher.use_ema), _diffusion(config, foreign), teacher, path)


def _pipeline(config: DistillRun, path: Path) -> Model:
    _refuse_descriptions(config.teacher, path)
    with naming("teacher.ckpt"):
        pipeline = read_pipeline(path)
    _same_diffusion(config, pipeline.diffusion)
    return _model(pipeline.network, pipeline.tensors, pipeline.diffusion, config.teacher, path)


def _refuse_descriptions(teacher: TeacherConfig, path: Path) -> None:
    for key in ("target", "params", "parameterization", "use_ema"):
        if getattr(teacher, key) not in (None, {}):
            raise UserError(f"teacher.{key}: {path} describes itself; remove the key")


def _own_folder(config: DistillRun, path: Path) -> Model:
    _refuse_descriptions(config.teacher, path)
    model = load_model(path)
    _same_diffusion(config, model.card.diffusion)
    return model


def _same_diffusion(config: DistillRun, own: DiffusionConfig) -> None:
    if config.diffusion not in (None, own):
        pairs = {f.name: (getattr(config.diffusion, f.name), getattr(own, f.name)) for f in fields(own)}
        words = [
            f"diffusion.{key}: {here}, but the teacher's is {its}" for key, (here, its) in pairs.items() if here != its
        ]
        raise UserError(f"{'; '.join(words)}; remove the section")


def _model(
    node: NetworkConfig,
    weights: Mapping[str, Tensor],
    diffusion: DiffusionConfig,
    teacher: TeacherConfig,
    path: Path,
    load: bool = True,
) -> Model:
    where = "teacher.params"
    network = build_loaded(node, where, NETWORKS, weights, path) if load else build(node, NETWORKS, where)
    check_network(network, where)
    card = ModelCard(path.name, node, diffusion, null_label=teacher.null_label)
    return Model(network, card, path if SPACES[diffusion.space].encoded else None)


def _network(teacher: TeacherConfig, foreign: Foreign) -> NetworkConfig:
    """The configured architecture, or the one that the tensors tell with what is configured besides."""
    target, params = teacher.target, teacher.params
    if target is None:
        inferred = foreign.infer()
        target, params = inferred.target, inferred.complete(params, "teacher.params", foreign.path)
    return NetworkConfig(target, params, teacher.parameterization or "eps")


def _diffusion(config: DistillRun, foreign: Foreign) -> DiffusionConfig:
    """The configured schedule, which must be the stored one where there is one, or the stored one."""
    if config.diffusion is not None:
        if foreign.alphas_cumprod is not None:
            compvis.check_schedule(foreign.alphas_cumprod, make_schedule(config.diffusion), foreign.path)
        return config.diffusion
    found = foreign.diffusion()
    if found is None:
        space, stored = ("latent", "scaled_linear") if foreign.kind == "compvis" else ("pixel", "cosine")
        raise UserError(
            f"diffusion: {foreign.path} ({NAMES[foreign.kind]}) does not tell its noise schedule; add the section, "
            f"for example diffusion.space={space} diffusion.schedule={stored} diffusion.num_timesteps=1000"
        )
    return found


RELEASES = {
    "ffhq256": "CompVis's LDM-VQ-4 release for FFHQ (ffhq.zip), unpack its model.ckpt",
    "celebahq256": "CompVis's LDM-VQ-4 release for CelebA-HQ (celeba.zip), unpack its model.ckpt",
    "cifar10": "DDPM-IP's release ADM_cifar10_baseline.pt",
    "celeba64": "DDPM-IP's release DDPM_IP_celeba64.pt",
    "imagenet32": "DDPM-IP's release DDPM_IP_imageNet32.pt",
}


def how_to_get(path: Path, key: str = "teacher.ckpt") -> str:
    """What to put where the checkpoint of a key is expected."""
    release = RELEASES.get(path.parent.name)
    if release:
        return f"download {release} and put it there, or set {key}=PATH"
    if path.parts[:1] == ("logs",):
        return f"it is the folder of a run: train that model first (scripts/train_ldm.py), or set {key}=PATH"
    if key == "first_stage.ckpt":
        return "name a first-stage folder (config.yaml and weights), or a checkpoint that holds one"
    return "set the key to a CompVis .ckpt, a guided-diffusion .pt, or a model folder with config.yaml and weights"


def check_network(network: nn.Module, where: str) -> None:
    """Refuse outputs that are neither of the states' channels nor twice as many, for a variance."""
    allowed = (network.in_channels, 2 * network.in_channels)
    if network.out_channels not in allowed:
        raise UserError(f"{where}.out_channels: {network.out_channels} must be {allowed[0]} or {allowed[1]}")


def check_trainable(network: nn.Module, diffusion: DiffusionConfig, where: str) -> None:
    """Refuse what data cannot teach: outside pixel space L_vlb's likelihood of 8-bit values means nothing."""
    check_network(network, where)
    if SPACES[diffusion.space].encoded and network.out_channels != network.in_channels:
        said = " (learn_sigma: false)" if hasattr(network, "null_label") else ""
        raise UserError(
            f"{where}.out_channels: {network.out_channels} must be {network.in_channels} in latent space{said}"
        )
