"""A diffusion model: network, schedule, what it predicts, its space, its first stage and where it came from."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm import checkpoints
from ldm_dkdm.checkpoints import FORMATS, Contents, Hints, Source
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import FirstStage, named_first_stage
from ldm_dkdm.checkpoints.loading import build_loaded, load_strictly
from ldm_dkdm.checkpoints.writing import refuse_existing
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageConfig, NetworkConfig, SamplingConfig
from ldm_dkdm.device import autocast, resolve_precision
from ldm_dkdm.diffusion.process import PARAMETERIZATIONS, reverse_step
from ldm_dkdm.diffusion.samplers import SAMPLERS, ImageNoise, last
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.first_stage.codec import Codec
from ldm_dkdm.networks import NETWORKS, DiT, UNet
from ldm_dkdm.networks.scaling import parse_budget, unet_within_budget
from ldm_dkdm.pixel import SPACES, PixelCodec, Space
from ldm_dkdm.records import NoisyBatch, Prediction
from ldm_dkdm.reporting import Progress, following
from ldm_dkdm.rng import forked_rng, numpy_generator


@dataclass(frozen=True)
class SampleBatch:
    """Samples of a model: states x_0 (B,C,h,w), images uint8 (B,H,W,C) on the CPU, labels (B,) if there are any."""

    states: Tensor
    images: Tensor
    labels: Tensor | None


class DiffusionModel:
    """A network with all that is needed to predict, sample, distil and save.

    Args:
        network: nn.Module (x (B,C,H,W), t (B,), label (B,) or None) -> (B,C,H,W), or (B,2C,H,W) with a learned
            variance (learned-range, Improved DDPM, Eq. 15).
        like: another model, which says what the arguments below leave out.
        schedule: the forward process.
        parameterization: what the network predicts, one of PARAMETERIZATIONS.
        space: what the states are, one of SPACES.
        shape: (C,H,W) of a state; default: what the network says (`in_channels`, `image_size`).
        num_classes: size of the label table, null label excluded; None for an unconditional model.
        null_label: the label that means none; default: the network's own.
        first_stage: where the first stage of a latent model lies.
        node: target and params that rebuild the network; default: those that the network remembers.
        info: facts for the model card.
        guidance: weight of classifier-free guidance in every prediction; 1 leaves it out.
        precision: `auto`, `bf16` or `32`, of predictions without gradients.

    Attributes:
        diffusion: the forward process as a config section.
        schedule: the same as a `NoiseSchedule`.
        path, format, file: where the model was read and the file that holds its weights; None for one made here.
        hints, described: what the user said when it was read, and whether it describes itself without that.

    Raises:
        UserError: an unknown name, a shape that is not told, or arguments that contradict the network.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        like: "DiffusionModel | None" = None,
        schedule: NoiseSchedule | None = None,
        parameterization: str | None = None,
        space: str | None = None,
        shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        first_stage: FirstStage | str | Path | None = None,
        node: NetworkConfig | None = None,
        info: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        precision: str = "32",
    ) -> None:
        self.network = network
        self.parameterization = parameterization or (like.parameterization if like and not node else "eps")
        pick(PARAMETERIZATIONS, self.parameterization, "parameterization")
        self.diffusion = _process(schedule, space, like)
        self.schedule = schedule_of(self.diffusion)
        self.shape = _shape(network, shape, like)
        self.num_classes, self.null_label = _labels(network, num_classes, null_label, like)
        stage = FirstStage(Path(first_stage)) if isinstance(first_stage, (str, Path)) else first_stage
        self.first_stage = stage or (like.first_stage if like else None)
        self._codec: Codec | None = like._codec if like and stage is None else None
        self.node = replace(node or _remembered(network), parameterization=self.parameterization)
        self.info: dict[str, Any] = dict(info or {})
        self.path: Path | None = None
        self.format: str | None = None
        self.file: Path | None = None
        self.hints, self.described = Hints(), False
        self.precision = precision
        self.guidance = guidance
        _check_guidance(self)

    # What it is

    @property
    def space(self) -> Space:
        """What the states are."""
        return SPACES[self.diffusion.space]

    @property
    def classes(self) -> list[int] | None:
        """The labels that mean a class; None for an unconditional model."""
        if self.num_classes is None:
            return None
        return [label for label in range(self.num_classes) if label != self.null_label]

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    def __repr__(self) -> str:
        kind, origin = type(self.network).__name__, f" from {self.path}" if self.path else ""
        return (
            f"DiffusionModel({kind}, {self.parameters / 1e6:.3g} M parameters, predicts {self.parameterization}, "
            f"{self.diffusion.space} states {self.shape}, {self.schedule.name} schedule, T = "
            f"{self.schedule.num_timesteps}{origin})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiffusionModel":
        """A copy has a network of its own; the schedule and the first stage are shared."""
        own = copy.copy(self)
        own.network = copy.deepcopy(self.network, memo)
        return own

    def changed(self, **attributes: Any) -> "DiffusionModel":
        """The same network with other attributes: guidance, null_label, precision, diffusion, info, network, node."""
        own = copy.copy(self)
        for name, value in attributes.items():
            setattr(own, name, value)
        own.schedule = schedule_of(own.diffusion) if "diffusion" in attributes else self.schedule
        _check_guidance(own)
        return own

    def frozen(self) -> "DiffusionModel":
        """Put the network in eval mode and freeze its parameters, as a teacher's; returns self."""
        self.network.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device | str, precision: str | None = None) -> "DiffusionModel":
        """Move network and first stage, and set the precision (`auto`, `bf16`, `32`) if given; returns self."""
        self.network.to(device)
        if precision is not None:
            self.precision = resolve_precision(precision, device)
        if self._codec is not None:
            self._codec.to(device, self.precision)
        return self

    # Predicting

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """States x (B,C,H,W) at timesteps t (B,) with labels (B,) -> the prediction, float32, with gradients."""
        return self.read(self._output(x, t, label).float(), x.float(), t)

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """The prediction that a network's output at x means; eps is never clipped, x_0 as the space says."""
        channels = x.shape[1]
        fraction = output[:, channels:] if output.shape[1] > channels else None
        output, means = output[:, :channels], PARAMETERIZATIONS[self.parameterization]
        x_0 = self.space.clipped(means.x_0(self.schedule, x, t, output))
        return Prediction(means.eps(self.schedule, x, t, output), x_0, fraction)

    def _output(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The network's output, with guidance (Ho & Salimans 2022): u + weight (c - u), in one call of twice the batch.

        c is the output with the label, u the one with the null label; a learned variance stays c's.
        """
        if self.guidance == 1:
            return self.network(x, t, label)
        labels = torch.cat([label, torch.full_like(label, self.null_label)])
        with_label, without = self.network(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        channels = x.shape[1]
        guided = without[:, :channels] + self.guidance * (with_label[:, :channels] - without[:, :channels])
        return torch.cat([guided, with_label[:, channels:]], 1)

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """eps and x_0 at states x (B,C,H,W), timesteps t (B,), labels (B,): one network call, without gradients."""
        with autocast(resolve_precision(self.precision, x.device), x.device):
            return self(x, t, label)

    def step(self, batch: NoisyBatch, noise: Tensor, stride: int | Tensor = 1) -> tuple[Prediction, Tensor]:
        """The prediction at x_t and, from the SAME call, x_{t-stride} (DKDM, dynamic iterative distillation)."""
        prediction = self.predict(batch.x, batch.t, batch.label)
        return prediction, reverse_step(self.schedule, batch.x, batch.t, prediction, noise, stride)

    def draw_labels(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Labels (count,) of classes, uniformly at random; None for an unconditional model."""
        if self.classes is None:
            return None
        classes = torch.tensor(self.classes, device=generator.device)
        return classes[torch.randint(len(classes), (count,), generator=generator, device=generator.device)]

    # Sampling

    def sample(
        self,
        count: int = 16,
        *,
        sampler: str = "ddim",
        steps: int | None = None,
        eta: float = 0.0,
        seed: int = 0,
        labels: Sequence[int] = (),
        batch_size: int = 64,
        progress: bool | Progress = False,
    ) -> Tensor:
        """Draw images uint8 (count,H,W,C); image i depends on seed + i only (and on its label).

        Args:
            sampler: one of SAMPLERS. steps: default 200, with `ddpm` all T. eta: DDIM's.
            labels: in turn, for a class-conditional model; default: one by each image's seed.
            progress: show a bar, or call a function (what, done, total).

        Raises:
            UserError: an unknown sampler, steps outside 1 ... T, labels that the model does not have.
        """
        config = SamplingConfig(count, batch_size, seed, steps, eta, sampler, list(labels))
        with following(progress, "sampling", "image", count) as done:
            images = []
            for batch in self.sample_batches(config):
                images.append(batch.images)
                done(sum(map(len, images)))
        return torch.cat(images)

    def sample_batches(self, config: SamplingConfig) -> Iterator[SampleBatch]:
        """Draw and decode batch by batch, so that no set of images need be in memory; errors as `sample`."""
        sampler, steps = self.require_sampling(config), self._steps(config)
        device, codec = self.device, self.codec().to(self.device, self.precision)
        mode = self.network.training
        self.network.eval()
        try:
            for start in range(0, config.count, config.batch_size):
                count = min(config.batch_size, config.count - start)
                noise = ImageNoise([config.seed + start + i for i in range(count)], self.shape, device)
                label = self._labels_of(config, start, count)
                label = None if label is None else label.to(device)
                states = last(sampler.walk(self.schedule, self.predict, noise(), noise, steps, label, config.eta))
                yield SampleBatch(states, codec.decode(states).cpu(), label)
        finally:
            self.network.train(mode)

    def require_sampling(self, config: SamplingConfig) -> Any:
        """The sampler of a config, found to fit this model.

        Raises:
            UserError: as `sample`.
        """
        sampler = pick(SAMPLERS, config.sampler, "sampler")
        sampler.timesteps(self.schedule, self._steps(config))  # refuses what does not fit
        if config.eta and not sampler.takes_eta:
            raise UserError(f"eta: has no effect with {config.sampler}; leave it out")
        if config.labels and self.classes is None:
            raise UserError("labels: the model is unconditional; leave them out")
        outside = [label for label in config.labels if label not in (self.classes or ())]
        if outside:
            raise UserError(f"labels: {outside[0]} is none of the model's {len(self.classes or ())} classes")
        return sampler

    def _steps(self, config: SamplingConfig) -> int:
        default = pick(SAMPLERS, config.sampler, "sampler").default_steps
        return config.steps or min(default or self.schedule.num_timesteps, self.schedule.num_timesteps)

    def _labels_of(self, config: SamplingConfig, first: int, count: int) -> Tensor | None:
        """Labels (count,) of the images first ... first+count-1."""
        classes, numbers = self.classes, range(first, first + count)
        if classes is None:
            return None
        if config.labels:
            return torch.tensor([config.labels[i % len(config.labels)] for i in numbers])
        draws = [numpy_generator(config.seed + i, 0, 0, "label").integers(len(classes)) for i in numbers]
        return torch.tensor([classes[draw] for draw in draws])

    def codec(self) -> Codec:
        """The first stage, opened when it is first asked for; in pixel space images are the states.

        Raises:
            UserError: the model does not say where it lies, or its latents have another shape.
        """
        if self._codec is None:
            self._codec = self._open_codec() if self.space.encoded else PixelCodec()
        return self._codec

    def _open_codec(self) -> Codec:
        stage = self.first_stage
        if stage is None:
            raise UserError(f"first_stage: {self.path or 'the model'} does not say where its first stage lies; name it")
        codec = stage.codec(self.shape[1], self.precision)
        for what, own, theirs in (
            ("{} latent channels", self.shape[0], codec.latent_channels),
            ("latents of side {}", self.shape[1], codec.latent_size),
        ):
            if own != theirs:
                raise UserError(f"first_stage: {stage.path} makes {what.format(theirs)}, the model has {own}")
        return codec

    # Checking, narrowing, saving

    def check(self, *, progress: bool = False) -> Any:
        """Refuse a model that does not denoise its own samples, or whose weights fit another reading better.

        Returns:
            `evaluation.teacher_check.Figures`: the figures that were found to be in order.

        Raises:
            UserError: the figure that failed, its value, what is expected, and the likely cause.
        """
        from ldm_dkdm.evaluation.teacher_check import check_teacher  # it stands above this module

        return check_teacher(self)

    def narrowed(self, budget: str | int, *, parameterization: str | None = None, seed: int = 0) -> "DiffusionModel":
        """A new model in this UNet's shape, as wide as a budget of parameters allows, with random weights.

        Args:
            budget: the most parameters that it may have: `60M`, `300k` or a number.
            parameterization: what it will predict; default: what this model predicts.
            seed: of its first weights.

        Raises:
            UserError: the network is no UNet, or even the narrowest one has more parameters.
        """
        if not isinstance(self.network, UNet):
            raise UserError("budget: narrows a UNet, and this model's network is none; make the student yourself")
        params = unet_within_budget(self.node.params, parse_budget(budget))
        kind = parameterization or self.parameterization
        return self.student(NetworkConfig("ldm_dkdm.networks.UNet", params, kind), seed)

    def student(self, node: NetworkConfig, seed: int = 0, where: str = "params") -> "DiffusionModel":
        """A new model of another architecture on this model's states, with random weights that follow from the seed.

        Raises:
            UserError: an unknown target or parameter; `where` prefixes its key.
        """
        with forked_rng(seed):
            network = build(node, NETWORKS, where)
        for key, theirs in (("in_channels", self.shape[0]), ("image_size", self.shape[1])):
            own = getattr(network, key, theirs)
            if own != theirs:
                name = "input_size" if key == "image_size" and isinstance(network, DiT) else key
                raise UserError(f"{where}.{name}: {own} differs from the teacher's {theirs}")
        return DiffusionModel(network, like=self, parameterization=node.parameterization, node=node)

    def save(self, path: str | Path, format: str = "folder") -> Path:
        """Write the model in one of FORMATS, whole or not at all; returns the path.

        Raises:
            UserError: an unknown format, one that cannot hold this model, or a file that exists.
        """
        path = Path(path)
        chosen = pick(FORMATS, format, "format")
        if format != "folder":
            refuse_existing(path)
        chosen.write(self, path)
        return path


def load_model(
    path: str | Path,
    *,
    network: nn.Module | None = None,
    precision: str = "32",
    guidance: float = 1.0,
    **hints: Any,
) -> DiffusionModel:
    """Open a diffusion model: anything that FORMATS lists.

    A run, a model folder, a training .ckpt of ours; CompVis's .ckpt; guided-diffusion's, DDPM-IP's and DiT's .pt;
    safetensors; a diffusers pipeline or its UNet2DModel. Nothing in a file runs.

    Args:
        path: file or folder.
        network: a module of your own class, where the file names one that the package does not know.
        precision: `auto`, `bf16` or `32`, of its predictions.
        guidance: weight of classifier-free guidance.
        hints: what no tensor tells. Keywords of the network (`image_size`, `num_head_channels`, ...), of the forward
            process (`schedule`, `num_timesteps`, `beta_start`, `beta_end`, `betas`, `space`), and `target`,
            `parameterization`, `use_ema`, `null_label`, `first_stage` (a path), `scale_factor`.

    Raises:
        UserError: nothing there, an unreadable or refused file, a hint that is missing or contradicts the file.
    """
    return open_model(path, Hints.of(**hints), network).changed(precision=precision, guidance=guidance)


def open_model(
    path: str | Path, hints: Hints, network: nn.Module | None = None, lenient: bool = False
) -> DiffusionModel:
    """The same with hints as a record, in float32 and without guidance.

    `lenient`: a model that describes itself takes no notice of hints on its network and process, since a command with
    several models passes one set of hints to all of them.
    """
    contents = checkpoints.read(Source(path))
    if lenient and contents.described:
        hints = replace(hints, params={}, diffusion={}, target=None, parameterization=None)
    where = "teacher.params" if hints.sections else "params"
    node, diffusion = contents.network(hints), contents.process(hints)
    if network is None and contents.described and node.target not in NETWORKS:
        raise UserError(
            f"{contents.path}: its network is {node.target}, which this package does not know; "
            "name its file with --plugin FILE.py, or in Python give network=MODULE"
        )
    if network is not None:
        load_strictly(network, contents.weights(hints), contents.file)
    else:
        network = build_loaded(node, where, NETWORKS, contents.weights(hints), contents.file)
    _check_outputs(network, where)
    return _model_of(contents, hints, network, node, diffusion)


def _model_of(
    contents: Contents, hints: Hints, network: nn.Module, node: NetworkConfig, diffusion: DiffusionConfig
) -> DiffusionModel:
    model = DiffusionModel(
        network.eval(),
        schedule=schedule_of(diffusion),
        parameterization=node.parameterization,
        space=diffusion.space,
        shape=contents.shape,
        num_classes=contents.num_classes,
        null_label=contents.null_label if hints.null_label is None else hints.null_label,
        first_stage=_stage(contents.first_stage, hints.first_stage, diffusion),
        node=node,
        info=contents.info,
    )
    model.diffusion = diffusion
    model.path, model.format, model.file = contents.path, contents.format, contents.file
    model.hints, model.described = hints, contents.described
    return model


def _stage(stage: FirstStage | None, given: FirstStageConfig, diffusion: DiffusionConfig) -> FirstStage | None:
    if not SPACES[diffusion.space].encoded:
        if given != FirstStageConfig():
            raise UserError("first_stage: pixel space has none; remove it, or set space=latent")
        return None
    return named_first_stage(given) if stage is None else stage.changed(given)


def _check_outputs(network: nn.Module, where: str) -> None:
    """Refuse outputs that are neither of the states' channels nor twice as many, for a variance."""
    inputs, outputs = getattr(network, "in_channels", None), getattr(network, "out_channels", None)
    if inputs is not None and outputs is not None and outputs not in (inputs, 2 * inputs):
        raise UserError(f"{where}.out_channels: {outputs} must be {inputs} or {2 * inputs}")


def _process(schedule: NoiseSchedule | None, space: str | None, like: DiffusionModel | None) -> DiffusionConfig:
    if schedule is None:
        base = like.diffusion if like else DiffusionConfig()
        return base if space is None else replace(base, space=space)
    space = space or (like.diffusion.space if like else "latent")
    if schedule.name == "betas":
        return DiffusionConfig(num_timesteps=schedule.num_timesteps, space=space, betas=schedule.betas.tolist())
    return DiffusionConfig(schedule.name, schedule.num_timesteps, schedule.beta_start, schedule.beta_end, space)


def _shape(network: nn.Module, shape: Sequence[int] | None, like: DiffusionModel | None) -> tuple[int, int, int]:
    channels, side = getattr(network, "in_channels", None), getattr(network, "image_size", None)
    own = (channels, side, side) if isinstance(channels, int) and isinstance(side, int) else None
    given = tuple(shape) if shape is not None else like.shape if like else own
    if given is None:
        raise UserError("shape: the network does not say what its states are; give (C,H,W) or like=MODEL")
    if own is not None and own != given:
        raise UserError(f"shape: the network takes states {own}, not {given}")
    return given


def _labels(
    network: nn.Module, num_classes: int | None, null_label: int | None, like: DiffusionModel | None
) -> tuple[int | None, int | None]:
    """(classes, null label) of a model: what is given, what the network says, or what another model has."""
    told = hasattr(network, "num_classes")
    own_null = getattr(network, "null_label", None)
    if told:
        classes = network.num_classes
        if num_classes not in (None, classes):
            raise UserError(f"num_classes: the network says {classes}, not {num_classes}")
        null = own_null if null_label is None else null_label
        if null is None and like is not None and like.null_label is not None and like.null_label < (classes or 0):
            null = like.null_label  # a row of this table that no teacher's label reaches
    else:
        classes = num_classes if num_classes is not None else like.num_classes if like else None
        null = null_label if null_label is not None else like.null_label if like else None
    rows = 0 if classes is None else classes + (own_null is not None or not told)
    if null is not None and null >= rows:
        raise UserError(f"null_label: {null} is outside the network's table of {rows} labels")
    return classes, null


def _check_guidance(model: DiffusionModel) -> None:
    if model.guidance == 1:
        return
    if model.guidance < 0:
        raise UserError(f"guidance: must be at least 0, got {model.guidance}")
    if model.num_classes is None:
        raise UserError("guidance: the model takes no labels; leave it out")
    if model.null_label is None:
        raise UserError("null_label: guidance needs the label that means none; set it")


def _remembered(network: nn.Module) -> NetworkConfig:
    """Target and params of a network: what it was built from, or the name of a class of the user's own."""
    kind = type(network)
    target = next((name for name, known in NETWORKS.items() if known is kind), f"{kind.__module__}.{kind.__qualname__}")
    return NetworkConfig(target, dict(getattr(network, "arguments", {})))
