"""Whose file a checkpoint is, which weights in it are the network's, and what it tells about them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_dkdm.checkpoints import compvis
from ldm_dkdm.checkpoints.inference import TOO_FEW, Inferred, infer_dit, infer_unet
from ldm_dkdm.checkpoints.reading import read_content, select_part, tensors_in
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError, blaming

NAMES = {
    "compvis": "CompVis latent diffusion",
    "adm": "guided-diffusion / DDPM-IP",
    "dit": "DiT",
}


USUAL_SCALED = (0.0015, 0.0195), (0.00085, 0.012)  # ends of beta: LDM's, Stable Diffusion's
USUAL_LINEAR = (1e-4, 0.02)


@dataclass(frozen=True)
class Foreign:
    """A diffusion network in somebody else's file.

    Args:
        path: of the file.
        kind: `compvis`, `adm` or `dit`.
        tensors: all of the file's, under its names.
        ema: the EMA weights under the network's own names; None where the file has none or they are all it has.
        raw: the weights as the optimizer left them; None where the file does not tell them apart.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    raw: Mapping[str, Tensor] | None

    def weights(self, use_ema: bool | None) -> Mapping[str, Tensor]:
        """The network's tensors: EMA unless told otherwise; where only one kind is there, that one.

        Raises:
            UserError: the kind that was asked for is not in the file.
        """
        if use_ema is None:
            return self.raw if self.ema is None else self.ema
        found = self.ema if use_ema else self.raw
        if found is None:
            has, value = ("no EMA weights", "false") if use_ema else ("EMA weights only", "true")
            raise UserError(f"{self.path}: holds {has}; set teacher.use_ema={value}, or remove the key")
        return found

    def infer(self) -> Inferred:
        """The architecture, as far as shapes tell it.

        Raises:
            UserError: tensors are missing, or it is a network of another kind.
        """
        weights = self.weights(None)
        try:
            if self.kind == "dit":
                return infer_dit(weights)
            return infer_unet(weights, self.path, self.kind == "compvis")
        except UserError:
            raise
        except TOO_FEW as error:
            raise UserError(f"{self.path}: its network is incomplete or of another kind ({error})") from error

    @property
    def alphas_cumprod(self) -> Tensor | None:
        """The schedule (T,) that the file stores."""
        stored = self.tensors.get("alphas_cumprod") if self.kind == "compvis" else None
        if stored is not None and not (stored.ndim == 1 and len(stored) and stored.is_floating_point()):
            raise UserError(
                f"{self.path}: alphas_cumprod is {stored.dtype} {tuple(stored.shape)}, which is no schedule"
            )
        return stored

    def diffusion(self) -> DiffusionConfig | None:
        """The schedule that the file stores, as a config; None where it stores none or one that we cannot name."""
        stored = self.alphas_cumprod
        return None if stored is None else infer_schedule(stored)

    def first_stage(self) -> dict[str, Tensor]:
        """The tensors of a first stage inside; empty where there is none."""
        return compvis.first_stage_tensors(self.tensors) if self.kind == "compvis" else {}


def open_foreign(path: Path) -> Foreign:
    """Recognise a diffusion model's file.

    Raises:
        UserError: an unreadable file, or one that holds something else; says what.
    """
    with blaming(path):
        return recognise(read_content(path), path)


def recognise(content: object, path: Path) -> Foreign:
    """The diffusion network in what a file holds; `path` is for messages."""
    tensors = _tensors(content, None, path)
    if any(name.startswith(compvis.UNET) for name in tensors):
        return _compvis(path, tensors)
    kind = _kind(tensors, path)
    if isinstance(content, Mapping) and isinstance(content.get("ema"), Mapping) and "model" in content:
        return Foreign(path, kind, tensors, _unwrapped(tensors), _unwrapped(_tensors(content, "model", path)))
    return Foreign(path, kind, tensors, None, _unwrapped(tensors))


def _compvis(path: Path, tensors: Mapping[str, Tensor]) -> Foreign:
    raw = compvis.under(tensors, compvis.UNET)
    ema = {name: tensors[compvis.ema_name(name)] for name in raw if compvis.ema_name(name) in tensors}
    return Foreign(path, "compvis", tensors, ema or None, raw)


def _kind(tensors: Mapping[str, Tensor], path: Path) -> str:
    names = {name.removeprefix("module.") for name in tensors}
    if any("lora" in name.lower() for name in names):
        raise UserError(f"{path}: is a LoRA adapter, which changes a model and is none; name the model itself")
    if "time_embed.0.weight" in names and "input_blocks.0.0.weight" in names:
        return "adm"
    if {"x_embedder.proj.weight", "final_layer.linear.weight", "pos_embed"} <= names:
        return "dit"
    raise UserError(f"{path}: {_what_else(names)}")


def _what_else(names: set[str]) -> str:
    def holds(*prefixes: str) -> bool:
        return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    if holds("network."):
        return "is a training checkpoint of a run of ours; name the run's student/ folder, which describes itself"
    if holds("encoder.", "decoder."):
        return "is a first stage, not a diffusion model; it belongs into first_stage.ckpt"
    if holds("down_blocks.", "mid_block."):
        return "is a diffusers network without its config.json; name the folder that holds both"
    if holds("total_t", "total_x_t_1"):
        return "is a pool of noisy states, not a network; it belongs into distill.pool_from"
    return f"holds no diffusion network that is known here (keys: {', '.join(sorted(names)[:4])})"


def _tensors(content: object, part: str | None, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        raise UserError(f"{path}: holds one tensor of shape {tuple(content.shape)}, not a network")
    tree = select_part(content, part, path)
    found = tensors_in(tree, path)
    if not found:
        raise UserError(f"{path}: holds no weights (keys: {', '.join(map(str, list(content)[:6]))})")
    return found


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel leaves."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def infer_schedule(alphas_cumprod: Tensor) -> DiffusionConfig | None:
    """The config whose schedule (T,) this is to 0.1%; None if we have none."""
    abar = alphas_cumprod.double()
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    stored = tuple(float(f"{value:.4g}") for value in (betas[0], betas[-1]))  # half precision leaves little of them
    steps = len(abar)
    for config in (
        *(DiffusionConfig("scaled_linear", steps, *ends) for ends in (stored, *USUAL_SCALED)),
        *(DiffusionConfig("linear", steps, *ends) for ends in (stored, USUAL_LINEAR)),
        DiffusionConfig("cosine", steps),
    ):
        try:
            schedule = NoiseSchedule(config.schedule, steps, config.beta_start, config.beta_end)
        except UserError:
            continue
        if torch.allclose(schedule.alphas_cumprod, abar, rtol=compvis.tolerance(alphas_cumprod), atol=1e-6):
            return config
    return None
