"""Make a student for a teacher: network, initial weights, and checks that it fits."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from ldm_dkdm.checkpoints import Source, read
from ldm_dkdm.checkpoints.as_built import other_constant
from ldm_dkdm.checkpoints.hints import Hints
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.config.schema import DiffusionConfig, LossConfig, NetworkConfig, NewNetworkConfig, StudentConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, is_out_of_memory
from ldm_dkdm.model import DiffusionModel
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.networks.modes import in_eval_mode, tensor_of
from ldm_dkdm.networks.scaling import slice_teacher
from ldm_dkdm.reporting import logger

LARGEST_WEIGHT = 1e4  # largest loss weight of a timestep without a cap; LDM's schedule has 200


def make_student(config: StudentConfig, teacher: DiffusionModel, seed: int = 0) -> DiffusionModel:
    """The student that a config describes, with its initial weights.

    Raises:
        UserError: an architecture that does not fit the teacher, or initial weights that do not fit it.
    """
    if config.budget is not None:
        student = _narrowed(config, config.budget, teacher, seed)
    elif config.target is None:
        raise UserError("student.target: missing; name a network and its params, or set student.budget=60M")
    else:
        node = NetworkConfig(config.target, config.params, config.parameterization)
        student = teacher.student(node, seed, "student.params")
    require_fit(student, teacher, begun=True)  # `assemble` refuses the rest where a run begins
    if config.init == "teacher":
        with _of_student():
            logger.info(f"student.init: {slice_teacher(student.network, teacher.network)}")
    else:
        load_initial(student.network, config, "student.init", "random nor teacher")
    return student


def _narrowed(config: StudentConfig, budget: str | int, teacher: DiffusionModel, seed: int) -> DiffusionModel:
    params = dict(config.params)
    groups = params.pop("norm_groups", None)
    if config.target is not None or params:
        raise UserError(
            "student.budget: chooses target and params itself, but for params.norm_groups; remove them or the budget"
        )
    with _of_student():
        student = teacher.narrowed(budget, parameterization=config.parameterization, norm_groups=groups, seed=seed)
    width = student.node.params["model_channels"]
    logger.info(f"student.budget {budget}: model_channels {width}, {student.parameters / 1e6:.3g} M parameters")
    return student


@contextmanager
def _of_student() -> Iterator[None]:
    """Prefix parameters in the library's errors with the section: `budget: ...` -> `student.budget: ...`."""
    try:
        yield
    except UserError as error:
        section = "student.params" if str(error).startswith("norm_groups") else "student"
        raise UserError(f"{section}.{error}") from error


def require_fit(student: DiffusionModel, teacher: DiffusionModel, begun: bool = False) -> None:
    """Refuse a student whose process, states, labels or outputs do not match the teacher's.

    A run that has `begun` may have as many labels with another one for no class: older versions did not look.

    Raises:
        UserError: what differs.
    """
    network, own = student.network, "student.params"
    if student.network is teacher.network:
        raise UserError("student: is the teacher itself; make a new network")
    if student.diffusion != teacher.diffusion or student.shape != teacher.shape:
        raise UserError("student: another process or other states than the teacher's; make it with like=teacher")
    others = student.classes is not None and student.classes != teacher.classes
    if others and not (begun and student.num_classes == teacher.num_classes):
        raise UserError(f"{own}.num_classes: {_other_classes(student, teacher)}")
    outputs = getattr(network, "out_channels", None)
    channels = student.shape[0]
    if outputs not in (None, channels, 2 * channels):
        raise UserError(f"{own}.out_channels: {outputs} must be {channels} or {2 * channels}")
    if outputs is not None and outputs > getattr(teacher.network, "out_channels", outputs):
        raise UserError(
            f"{own}.out_channels: {outputs}, but the teacher has no variance to teach; "
            + ("set learn_sigma: false" if isinstance(network, DiT) else f"set it to {channels}")
        )


def _other_classes(student: DiffusionModel, teacher: DiffusionModel) -> str:
    """How the classes of two models differ, and what fits, for a message."""
    if teacher.classes is None or teacher.null_label is None:
        return f"{student.num_classes} differs from the teacher's {teacher.num_classes}"
    own_null = getattr(student.network, "null_label", None) is not None
    if own_null and teacher.null_label != len(teacher.classes):
        advice = f"set {teacher.num_classes} and class_dropout_prob: 0, or train a UNet"
    else:
        advice = f"set it to {len(teacher.classes) if own_null else teacher.num_classes}"
    null = f"null_label {teacher.null_label}"
    return f"{student.num_classes} makes other classes than the teacher's {len(teacher.classes)} ({null}); {advice}"


def name_lone_channels(student: DiffusionModel, teacher: DiffusionModel) -> None:
    """Say that the student's UNet normalises channels one by one, where the teacher does not.

    Such a channel loses its mean over the image (docs/evidence.md, "Two channels of the first level ...").
    """
    own, theirs = (_fewest_in_a_group(model.network) for model in (student, teacher))
    if isinstance(student.network, UNet) and own == 1 < theirs:
        groups = next(layer.num_groups for layer in student.network.modules() if isinstance(layer, nn.GroupNorm))
        logger.info(
            f"student.params.norm_groups: with {groups} some channels are normalised one by one and lose their mean "
            "over the image; with 16 in place of 32 the study's student of 32 channels was better (docs/evidence.md)"
        )


def _fewest_in_a_group(network: nn.Module) -> int:
    """The smallest number of channels that a norm of a network takes together; 2 without such norms."""
    norms = (layer for layer in network.modules() if isinstance(layer, nn.GroupNorm))
    return min((norm.num_channels // norm.num_groups for norm in norms), default=2)


@torch.no_grad()
def require_call(student: DiffusionModel) -> bool:
    """Refuse a module that cannot be called as a network; one sample is tried -> whether it learns a variance.

    Raises:
        UserError: weights that are not float32, the call's error, or the shape of its output.
    """
    channels, *sides = student.shape
    label = None if student.classes is None else torch.tensor(student.classes[:1], device=student.device)
    x = torch.zeros(1, *student.shape, dtype=torch.float32, device=student.device)
    t = torch.full((1,), student.schedule.num_timesteps - 1, device=student.device)  # the largest timestep
    try:
        with in_eval_mode(student.network):
            output = tensor_of(student.network(x, t, label))
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        if (found := _other_format(student.network)) is not None:
            raise UserError(
                f"student: its network has {found} weights, and students are trained in float32: call network.float(); "
                "precision=bf16 computes in bf16"
            ) from error
        raise UserError(
            f"student: its network cannot be called as network(x {tuple(x.shape)}, t (1,), label): {error}"
        ) from error
    allowed = [(1, count * channels, *sides) for count in (1, 2)]
    if tuple(output.shape) not in allowed:
        raise UserError(f"student: its network gives {tuple(output.shape)} for states {tuple(x.shape)}")
    return output.shape[1] == 2 * channels


def _other_format(network: nn.Module) -> str | None:
    """The number format of a network's weights that is not float32."""
    formats = (weight.dtype for weight in network.parameters() if weight.is_floating_point())
    return next((str(one).removeprefix("torch.") for one in formats if one != torch.float32), None)


def load_initial(network: nn.Module, node: NewNetworkConfig, where: str, words: str = "random") -> None:
    """Set a network's initial weights: unchanged (`random`), or those of a model.

    Raises:
        UserError: no model, or one that predicts something else or does not fit.
    """
    if node.init == "random":
        return
    if not Path(node.init).exists():
        raise UserError(f"{where}: '{node.init}' is neither {words} nor a model folder with config.yaml and weights")
    contents, hints = read(Source(node.init)), Hints()
    found = contents.parameterization or "eps"
    if found != node.parameterization:
        raise UserError(f"{where}: {node.init} predicts {found}; set parameterization to that, or init to random")
    load_strictly(network, contents.weights(hints), contents.file)
    with suppress(UserError):  # a file that does not say what its network is
        if found := other_constant(network, contents.network(hints)):
            logger.warning(f"{where}: {node.init} has weights of another network ({found}); they are taken as they are")


def require_variance(loss: LossConfig, where: str = "loss") -> None:
    """Refuse keys of the variational bound for a student that learns no variance, so that they have no effect.

    Raises:
        UserError: names the key.
    """
    weighs = loss.vlb_weight not in (0, LossConfig.vlb_weight)  # lambda as the paper has it stands in every config
    if weighs or loss.clip_student:
        key, default = ("vlb_weight", LossConfig.vlb_weight) if weighs else ("clip_student", "false")
        raise UserError(
            f"{where}.{key}: has no effect, since the student learns no variance (out_channels, learn_sigma); "
            f"remove it or set {default}"
        )


def require_fixed_variance(process: DiffusionConfig | None) -> None:
    """Refuse a variance of the process where the network to train predicts its own, so that it has no effect.

    Raises:
        UserError: names the key.
    """
    if process is not None and process.variance is not None:
        raise UserError(
            "diffusion.variance: has no effect, since the network to train predicts its own (out_channels, "
            "learn_sigma); remove it"
        )


def check_loss(loss: LossConfig, schedule: NoiseSchedule, where: str = "loss") -> None:
    """Refuse a cap without effect, and weights with which the noisiest steps dominate or are not taught."""
    if loss.space == "eps" and loss.weight_cap is not None:
        raise UserError(f"{where}.weight_cap: has no effect with space: eps; remove it or choose v or x0")
    if schedule.ends_in_noise:
        if loss.space == "eps" or loss.weight_cap is not None:
            given = "space: eps" if loss.space == "eps" else f"weight_cap: {loss.weight_cap}"
            raise UserError(
                f"{where}.{given} teaches nothing at t = T-1 of this process, where abar is 0 "
                "(rescale_betas_zero_snr); choose space v without a cap"
            )
        return  # its networks predict v or x0, of which no error is magnified
    largest = 1 / schedule.alphas_cumprod[-1].item()
    if loss.space != "eps" and loss.weight_cap is None and largest > LARGEST_WEIGHT:
        raise UserError(
            f"{where}.weight_cap: with space: {loss.space} this schedule weights the last step by {largest:.1e}; "
            "set a cap, for example 10"
        )
