"""A diffusion model: network, schedule, what it predicts, its space, its first stage and where it came from."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_dkdm.checkpoints import FORMATS, Hints
from ldm_dkdm.checkpoints.contents import clipping_of, schedule_of
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.checkpoints.writing import refuse_existing
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import NetworkConfig, SamplingConfig
from ldm_dkdm.device import PRECISIONS, autocast, resolve_device, resolve_precision
from ldm_dkdm.diffusion.process import PARAMETERIZATIONS, reverse_step
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, pick
from ldm_dkdm.first_stage.codec import Codec
from ldm_dkdm.model.arguments import facts_of, fitting, network_of, path_of
from ldm_dkdm.model.changes import changed, narrowed_node, same_codec, stage_of
from ldm_dkdm.model.facts import labels_of, open_codec, process_of, remembered, require_meaning, shape_of, table_of
from ldm_dkdm.model.guidance import output_of, require_guidance
from ldm_dkdm.model.sampling import SampleBatch, sample_batches
from ldm_dkdm.networks import NETWORKS, DiT
from ldm_dkdm.networks.cost import parameters
from ldm_dkdm.networks.modes import in_eval_mode
from ldm_dkdm.pixel import SPACES, PixelCodec, Space
from ldm_dkdm.records import NoisyBatch, Prediction
from ldm_dkdm.reporting import Progress, following
from ldm_dkdm.rng import forked_rng


class DiffusionModel:
    """A network with all that is needed to predict, sample, distil and save.

    Args:
        network: nn.Module (x (B,C,H,W), t (B,), label (B,) or None) -> (B,C,H,W), or (B,2C,H,W) with a learned
            variance (learned-range, Improved DDPM, Eq. 15); diffusers' UNet2DModel too, whose record is opened.
        like: a model that supplies what is not given. node: target, params and parameterization; default: as built.
        schedule: the forward process; what it does not say of sampling is that of `like`, else of the space.
        parameterization: what the network predicts, one of PARAMETERIZATIONS. space: of the states, one of SPACES.
        shape: (C,H,W) of a state; default: the network's (`in_channels`, `image_size`).
        num_classes: size of the label table, null label excluded; None: no labels. null_label: default: the network's.
        first_stage: path of a latent model's first stage. info: facts for the model card.
        guidance: weight of classifier-free guidance, 1: none. precision: `auto`, `bf16` or `32`, without gradients.

    Attributes:
        diffusion, schedule: the forward process as a config section, and as a `NoiseSchedule`.
        path, format, file: where the model was read, and the file with its weights; None for a new model.
        hints, described, stores_schedule: the hints when it was read, whether it describes itself, or its process.

    Raises:
        UserError: an unknown name, a missing shape, or arguments that contradict the network.
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
        first_stage: FirstStageSource | str | Path | None = None,
        node: NetworkConfig | None = None,
        info: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        precision: str = "32",
    ) -> None:
        self.network = network_of(network, like)
        usual: str = getattr(node or like, "parameterization", "eps")
        self.parameterization = parameterization or usual
        pick(PARAMETERIZATIONS, self.parameterization, "parameterization")
        pick(PRECISIONS, precision, "precision")
        self.diffusion = process_of(schedule, space, like)
        self.schedule = schedule_of(self.diffusion)
        require_meaning(self.parameterization, self.schedule)
        self.shape = shape_of(self.network, shape, like)
        self.num_classes, self.null_label = labels_of(self.network, num_classes, null_label, like)
        stage = like.first_stage if like and first_stage is None else first_stage
        self.first_stage: FirstStageSource | None = stage_of(stage, self.space.encoded)
        self._codec: Codec | None = like._codec if like and same_codec(self, like) else None
        self.node = replace(node or remembered(self.network), parameterization=self.parameterization)
        self.path: Path | None = None
        self.format: str | None = None
        self.file: Path | None = None
        self.hints, self.described, self.stores_schedule = Hints(), False, False
        self.info, self.precision, self.guidance = facts_of(info), precision, guidance
        require_guidance(self)

    @property
    def space(self) -> Space:
        """The space of the states."""
        return SPACES[self.diffusion.space]

    @property
    def classes(self) -> list[int] | None:
        """The labels that stand for a class; None for an unconditional model."""
        return None if self.num_classes is None else [i for i in range(self.num_classes) if i != self.null_label]

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return parameters(self.network)

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    def __repr__(self) -> str:
        kind, states = type(self.network).__name__, f"{self.diffusion.space} states {self.shape}"
        steps = f"{self.schedule.name} schedule, T = {self.schedule.num_timesteps}"
        size = f"{self.parameters / 1e6:.3g} M parameters"
        return f"DiffusionModel({kind}, {size}, predicts {self.parameterization}, {states}, {steps}, from {self.path})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiffusionModel":
        """A copy has a network of its own; the schedule and the first stage are shared."""
        own = copy.copy(self)
        own.network = copy.deepcopy(self.network, memo)
        return own

    def changed(self, **attributes: Any) -> "DiffusionModel":
        """The same model, with the same network, and other attributes: any of `model.changes.CHANGEABLE`.

        A first stage that is open stays so while space, shape and `first_stage` are the same.

        Raises:
            UserError: an attribute that cannot change, or a value that does not fit.
        """
        return changed(self, attributes)

    def frozen(self) -> "DiffusionModel":
        """Put the network in eval mode and freeze its parameters; returns self."""
        self.network.eval().requires_grad_(False)
        return self

    def to(self, device: torch.device | str, precision: str | None = None) -> "DiffusionModel":
        """Move network and first stage, and set the precision (`auto`, `bf16`, `32`) if given; returns self.

        Raises:
            UserError: a device that PyTorch cannot use here, or an unknown precision.
        """
        device = resolve_device(str(device))
        if precision is not None:
            self.precision = resolve_precision(precision, device)
        self.network.to(device)
        if self._codec is not None:
            self._codec.to(device, resolve_precision(self.precision, device))
        return self

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """States x (B,C,H,W) at timesteps t (B,) with labels (B,) -> the prediction, float32, with gradients."""
        return self.read(output_of(self, x, t, label).float(), x.float(), t)

    def read(self, output: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """Interpret a network's output at x; eps is never clipped, x_0 as the process says."""
        output, fraction = output[:, : x.shape[1]], output[:, x.shape[1] :] if output.shape[1] > x.shape[1] else None
        means = PARAMETERIZATIONS[self.parameterization]
        x_0 = clipping_of(self.diffusion)(means.x_0(self.schedule, x, t, output))
        return Prediction(means.eps(self.schedule, x, t, output), x_0, fraction)

    def predict(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Prediction:
        """eps and x_0, float32, at x (B,C,H,W) of any float format, t (B,), labels (B,); eval mode, no gradients.

        Raises:
            UserError: names the argument: a wrong type, shape or side, a timestep outside 0 ... T-1, an unknown label.
        """
        return self._call(*fitting(self, x, t, label))

    @torch.no_grad()
    def _call(self, x: Tensor, t: Tensor, label: Tensor | None) -> Prediction:
        with in_eval_mode(self.network), autocast(resolve_precision(self.precision, x.device), x.device):
            return self(x, t, label)

    def step(self, batch: NoisyBatch, noise: Tensor, stride: int | Tensor = 1) -> tuple[Prediction, Tensor]:
        """The prediction at x_t and, from the SAME call, x_{t-stride} (DKDM, dynamic iterative distillation)."""
        prediction = self._call(batch.x, batch.t, batch.label)
        return prediction, reverse_step(self.schedule, batch.x, batch.t, prediction, noise, stride)

    def draw_labels(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Labels (count,) of classes, uniformly at random; None for an unconditional model."""
        if self.classes is None:
            return None
        classes = table_of(tuple(self.classes), generator.device)
        return classes[torch.randint(len(classes), (count,), generator=generator, device=generator.device)]

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
        """Draw images uint8 (count,H,W,C); image i depends on seed + i modulo 2^32 only (and on its label).

        Args:
            sampler: one of SAMPLERS. steps: default 200, with `ddpm` all T. eta: DDIM's.
            labels: in turn, of a class-conditional model; default: by the seeds. progress: a bar, or a function.

        Raises:
            UserError: an unknown sampler, steps outside 1 ... T, unknown labels, or predictions that are not finite.
        """
        config = SamplingConfig(count, batch_size, seed, steps, eta, sampler, labels)
        with following(progress, "sampling", "image", count) as done:
            images = []
            for batch in self.sample_batches(config):
                images.append(batch.images)
                done(sum(map(len, images)))
        return torch.cat(images)

    def sample_batches(self, config: SamplingConfig) -> Iterator[SampleBatch]:
        """Draw and decode batch by batch, so that the images need not fit in memory; errors as `sample`."""
        return sample_batches(self, config)

    def codec(self) -> Codec:
        """The first stage, opened on first use; in pixel space images are the states.

        Raises:
            UserError: the model names none, or its latents have another shape.
        """
        if self._codec is None:
            self._codec = open_codec(self) if self.space.encoded else PixelCodec(self.shape[0])
        return self._codec

    def sharing_codec(self, other: "DiffusionModel") -> "DiffusionModel":
        """Use the first stage that another model has opened, if it is the same one; returns self."""
        if same_codec(self, other):
            self._codec = other.codec()
        return self

    def check(self) -> Any:
        """Refuse a model that does not denoise its own samples, or whose weights fit an alternative better.

        Returns:
            `evaluation.teacher_check.CheckFigures`, which pass.

        Raises:
            UserError: the figure that failed, its value, what is expected, and the likely cause.
        """
        from ldm_dkdm.evaluation.teacher_check import check_teacher  # it imports this module

        return check_teacher(self)

    def narrowed(
        self, budget: str | int, *, parameterization: str | None = None, norm_groups: int | None = None, seed: int = 0
    ) -> "DiffusionModel":
        """A new model in this UNet's shape, as wide as a budget of parameters allows, with random weights.

        Args:
            budget: largest number of parameters: `60M`, `300k` or a number.
            parameterization, norm_groups: what it will predict, and the groups of its norms; default: as this model.
            seed: seed of its initial weights.

        Raises:
            UserError: the network is not a UNet, the narrowest one has more parameters, or no width has the groups.
        """
        return self.student(narrowed_node(self, budget, parameterization, norm_groups), seed)

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
        """Write the model in one of FORMATS, atomically; returns the path.

        Raises:
            UserError: an unknown format, one that cannot hold this model, or a file that exists.
        """
        path, chosen = path_of(path, "path"), pick(FORMATS, format, "format")
        if format != "folder":
            refuse_existing(path)
        chosen.write(self, path)
        return path
