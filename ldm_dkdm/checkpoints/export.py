"""Our models in other code bases' layouts."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm_dkdm.checkpoints.compvis import FIRST_STAGE, UNET, ema_name
from ldm_dkdm.checkpoints.reading import file_kind
from ldm_dkdm.config.load import parse
from ldm_dkdm.config.schema import ModelCard
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import replacing, write_tensors, write_text
from ldm_dkdm.networks import UNet

COMPVIS_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "cosine": "cosine"}


COMPVIS_FIRST_STAGES = {
    "VQModel": "ldm.models.autoencoder.VQModelInterface",
    "AutoencoderKL": "ldm.models.autoencoder.AutoencoderKL",
}


def check_eps_unet(network: nn.Module, card: ModelCard, code_base: str) -> None:
    """Refuse what CompVis's and guided-diffusion's samplers would misread.

    Raises:
        UserError: another architecture, or a network that predicts v.
    """
    if not isinstance(network, UNet):
        raise UserError(f"--to: {code_base} has no {type(network).__name__}; choose safetensors")
    if card.network.parameterization != "eps":
        raise UserError(
            f"--to: {code_base} reads the output as eps, and this network predicts {card.network.parameterization}; "
            "choose diffusers or safetensors"
        )


def compvis_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The schedule buffers (T,), float32, that CompVis's DDPM class registers (v_posterior = 0)."""
    betas, abar = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": abar.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - abar),
    }
    return {name: values.float() for name, values in buffers.items()}


def write_compvis(
    path: Path,
    network: nn.Module,
    card: ModelCard,
    schedule: NoiseSchedule,
    first_stage: nn.Module,
    first_stage_params: Mapping[str, Any],
    scale_factor: float,
) -> None:
    """Write CompVis's layout: weights, EMA (the same), schedule, first stage; and its config beside it as YAML.

    Raises:
        UserError: what `check_eps_unet` refuses, and a first level that is wider than the base width.
    """
    check_eps_unet(network, card, "CompVis's code")
    if card.network.params.get("channel_mult", [1])[0] != 1:
        raise UserError("--to: in CompVis's code channel_mult begins with 1; choose safetensors")
    weights = _plain(network.state_dict())
    state = {f"{UNET}{name}": value for name, value in weights.items()}
    state |= {ema_name(name): value for name, value in weights.items()}
    steps = torch.tensor(int(card.info.get("step", 0)), dtype=torch.int)
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": steps}
    state |= compvis_buffers(schedule)
    state |= {f"{FIRST_STAGE}{name}": value for name, value in _plain(first_stage.state_dict()).items()}
    if scale_factor != 1:
        state["scale_factor"] = torch.tensor(scale_factor)
    content = {"epoch": 0, "global_step": int(steps), "pytorch-lightning_version": "1.4.2", "state_dict": state}
    with replacing(path) as temporary:
        torch.save(content, temporary)
    config = compvis_config(card, type(first_stage).__name__, first_stage_params, scale_factor)
    write_text(path.with_suffix(".yaml"), json.dumps(config, indent=2) + "\n")  # JSON is YAML


def compvis_config(
    card: ModelCard, first_stage: str, first_stage_params: Mapping[str, Any], scale_factor: float
) -> dict[str, Any]:
    """The `model` section that CompVis's scripts instantiate."""
    diffusion, params = card.diffusion, dict(card.network.params)
    params.pop("num_classes", None)
    if params.get("num_head_channels", -1) == -1:
        params.setdefault("num_heads", 1)  # CompVis's code has no default
    stage = {**first_stage_params, "lossconfig": {"target": "torch.nn.Identity"}}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "beta_schedule": COMPVIS_SCHEDULES[diffusion.schedule],
                "linear_start": diffusion.beta_start,
                "linear_end": diffusion.beta_end,
                "timesteps": diffusion.num_timesteps,
                "first_stage_key": "image",
                "image_size": params["image_size"],
                "channels": params["in_channels"],
                "scale_by_std": scale_factor != 1,
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params},
                "first_stage_config": {"target": COMPVIS_FIRST_STAGES[first_stage], "params": stage},
                "cond_stage_config": "__is_unconditional__",
            },
        }
    }


def write_adm(path: Path, network: nn.Module, card: ModelCard) -> None:
    """Write guided-diffusion's layout: the bare dictionary of tensors.

    Raises:
        UserError: what `check_eps_unet` refuses.
    """
    check_eps_unet(network, card, "guided-diffusion")
    with replacing(path) as temporary:
        torch.save(_plain(network.state_dict()), temporary)


def write_safetensors(path: Path, network: nn.Module, card: ModelCard) -> None:
    """Write one file whose metadata holds all that shapes do not tell: network, parameterization, diffusion."""
    described = {
        "target": card.network.target,
        "params": json.dumps(_values(card.network.params)),
        "parameterization": card.network.parameterization,
        "diffusion": json.dumps(asdict(card.diffusion)),
        "null_label": json.dumps(card.null_label),
        "info": json.dumps(_values(card.info)),
    }
    write_tensors(path, _plain(network.state_dict()), described)


def read_description(path: Path) -> ModelCard | None:
    """The card that `write_safetensors` put into a file's metadata; None for any other file.

    Raises:
        UserError: metadata that begin like ours and are damaged.
    """
    if file_kind(path) != "safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
        if "target" not in found or "parameterization" not in found:
            return None
        node = {key: found[key] for key in ("target", "parameterization")} | {"params": json.loads(found["params"])}
        card = {"weights": path.name, "network": node, "diffusion": json.loads(found["diffusion"])}
        card |= {key: json.loads(found[key]) for key in ("null_label", "info") if key in found}
        return parse(ModelCard, card, "metadata")
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file (is it complete?): {error}") from error


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _values(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _values(value) for key, value in tree.items()}
    return [_values(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
