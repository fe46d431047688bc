"""Read and write CompVis's layout: UNet, its EMA, the schedule and the first stage in one state dict."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_dkdm.checkpoints.compvis_agreement import require_agreement
from ldm_dkdm.checkpoints.compvis_config import CompVisConfig, config_beside
from ldm_dkdm.checkpoints.config_files import config_path
from ldm_dkdm.checkpoints.contents import Contents, schedule_of, tolerance
from ldm_dkdm.checkpoints.first_stages import PREFIX, UNSCALED, FirstStageSource, tensors_of
from ldm_dkdm.checkpoints.shapes import detached, plain, under
from ldm_dkdm.checkpoints.source import Source
from ldm_dkdm.checkpoints.state_dicts import UNET as NAMES
from ldm_dkdm.checkpoints.state_dicts import completed, prefixes_of
from ldm_dkdm.checkpoints.unet_shapes import infer_unet
from ldm_dkdm.checkpoints.writing import (
    SavedModel,
    refuse_existing,
    require_eps_unet,
    require_name,
    require_plain_timesteps,
)
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.diffusion.schedule import SCHEDULES, NoiseSchedule, betas_of
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import write_text, write_torch
from ldm_dkdm.reporting import logger

NAME = "CompVis latent diffusion"
UNET = "model.diffusion_model."
EMA = "model_ema."
CLASS_EMBEDDER = "cond_stage_model.embedding.weight"  # the table of CompVis's ClassEmbedder
AVERAGED = EMA + "diffusion_model"  # begins LitEma's names of the UNet's tensors, which have no dots
WRAPPED = re.compile(r"(?P<outer>(.*\.)?)model\.(module\.)*diffusion_model\.(?P<inner>.*)")  # wrappers around the UNet
DOTLESS = "module|_orig_mod"  # what DistributedDataParallel and torch.compile leave in LitEma's names
USUAL_ENDS = (0.0015, 0.0195), (0.00085, 0.012), (1e-4, 0.02)  # betas of LDM, Stable Diffusion, DDPM
THEIR_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "cosine": "cosine"}  # ours -> CompVis's names
LEAST_ALPHA = 1e-15  # alpha_T that stands for one stored as 0, since betas must be below 1
FIRST_STAGES = {
    "VQModel": "ldm.models.autoencoder.VQModelInterface",
    "AutoencoderKL": "ldm.models.autoencoder.AutoencoderKL",
}  # class -> CompVis's target


def recognises(source: Source) -> bool:
    """Whether a file holds a UNet under CompVis's prefix."""
    return source.kind != "folder" and any(name.startswith(UNET) for name in tensors_from(source))


def tensors_from(source: Source) -> dict[str, Tensor]:
    """A file's tensors under CompVis's names: without a prefix before them, nor what wrappers of the UNet leave."""
    places = (WRAPPED.fullmatch(prefix) for prefix in prefixes_of(source.tensors, NAMES))
    place = next((match for match in places if match), None)
    if place is None:
        return dict(source.tensors)
    network, outer, inner = place[0], place["outer"], re.escape(place["inner"].replace(".", ""))
    averaged = re.compile(rf"{re.escape(EMA)}({DOTLESS})*diffusion_model({DOTLESS}|{inner})*")

    def named(name: str) -> str:
        if name.startswith(network):
            return UNET + name.removeprefix(network)
        return averaged.sub(AVERAGED, name.removeprefix(outer), count=1)

    return {named(name): value for name, value in source.tensors.items()}


def read(source: Source) -> Contents:
    """Infer the network; read the schedule and the first stage that are stored.

    Raises:
        UserError: a network of another kind, or one whose tensors are incomplete.
    """
    tensors = tensors_from(source)
    raw = under(tensors, UNET)
    ema = _averaged(tensors, raw, source.path) or source.weights(NAMES).ema or {}
    unet = infer_unet(ema or raw, source.path, compvis=True, embeds_classes=CLASS_EMBEDDER in tensors)
    config = config_beside(source.path, unet["params"])
    stored = _stored_schedule(tensors, source.path)
    diffusion = None if stored is None else name_schedule(stored)
    own: dict[str, Any] = {}
    if config is not None:
        require_agreement(config, unet["params"], tensors.get("scale_factor"), source.path)
        unet["usual"] = {**unet["usual"], **config.usual}
        diffusion, own = _configured(config, diffusion, stored, source.path)
        if config.use_ema is False and ema:
            logger.info(f"{config.file}: use_ema: false, so the raw weights are taken")
    if diffusion is not None and _varies_by_beta(tensors):
        diffusion = replace(diffusion, variance="beta")
    return Contents(
        path=source.path,
        file=source.path,
        format=NAME,
        **unet,
        **own,
        ema=ema or None,
        raw=raw,
        diffusion=diffusion,
        alphas_cumprod=stored,
        first_stage=_first_stage(tensors, source.path, config),
    )


def _configured(
    config: CompVisConfig, named: DiffusionConfig | None, stored: Tensor | None, path: Path
) -> tuple[DiffusionConfig | None, dict[str, Any]]:
    """The forward process with what a config says of it, and the config's other keywords of `Contents`."""
    own: dict[str, Any] = {"parameterization": config.parameterization, "space": config.space}
    if config.use_ema is False:
        own["use_ema"] = False
    if stored is None:
        found = config.diffusion()
        return found, own if found else {**own, "unknown_schedule": config.unknown_schedule}
    config.require_stored(stored, named is not None and named.rescale_betas_zero_snr, path)
    return named and replace(named, **config.sampling()), own


def _averaged(tensors: Mapping[str, Tensor], raw: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """CompVis's EMA under the network's names; it has none of layers that were not trained, whose weights are raw."""
    known = {name: tensors[ema_name(name)] for name in raw if ema_name(name) in tensors}
    return completed(known, raw, path)


def _varies_by_beta(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the stored variance of an ancestral step is beta_t (CompVis's `v_posterior: 1`)."""
    stored, betas = tensors.get("posterior_variance"), tensors.get("betas")
    if stored is None or betas is None or stored.shape != betas.shape or len(betas) < 2:
        return False
    return torch.allclose(stored.double(), betas.double(), rtol=tolerance(betas))


def _first_stage(tensors: Mapping[str, Tensor], path: Path, config: CompVisConfig | None) -> FirstStageSource:
    """The first stage in the file; its scale is the stored one, else the config's, else 1."""
    scale = tensors.get("scale_factor")
    given = None if config is None or scale is not None else config.scale_factor
    if not any(name.startswith(PREFIX) for name in tensors):
        return FirstStageSource(path, given)
    usual, doubt = (None, "") if scale is not None else (1.0, "" if given else UNSCALED)
    return FirstStageSource(path, given or usual, tensors=tensors_of(tensors), stored=scale, doubt=doubt)


def ema_name(parameter: str) -> str:
    """CompVis's EMA key of a UNet parameter: its full name without the `model.` prefix and without dots."""
    return EMA + (UNET.removeprefix("model.") + parameter).replace(".", "")


def _stored_schedule(tensors: Mapping[str, Tensor], path: Path) -> Tensor | None:
    stored = tensors.get("alphas_cumprod")
    if stored is not None and not (stored.ndim == 1 and len(stored) and stored.is_floating_point()):
        raise UserError(f"{path}: alphas_cumprod is {stored.dtype} {tuple(stored.shape)}, which is not a schedule")
    return stored


def name_schedule(alphas_cumprod: Tensor) -> DiffusionConfig | None:
    """Config of a stored schedule (T,): one of SCHEDULES that equals it to 0.1%, else its betas; None if invalid.

    One that ends in pure noise (abar_{T-1} = 0) is a schedule after `rescale_betas_zero_snr`.
    """
    betas, steps = betas_of(alphas_cumprod), len(alphas_cumprod)
    first, final = (float(f"{value:.4g}") for value in (betas[0], betas[-1]))  # inexact in half precision
    ends_in_noise = bool(alphas_cumprod[-1] == 0)
    small = ends_in_noise and alphas_cumprod.dtype == torch.float16  # float16 also rounds a small abar_T to 0
    choices = (False, True) if small else (ends_in_noise,)
    for rescaled, name, (start, end) in product(choices, SCHEDULES, ((first, final), *USUAL_ENDS)):
        if 0 < start <= end < 1:
            config = DiffusionConfig(name, steps, start, end, rescale_betas_zero_snr=rescaled)
            with suppress(UserError):  # these ends leave nothing of x_0 at T
                wanted = schedule_of(config).alphas_cumprod
                if torch.allclose(wanted, alphas_cumprod.double(), rtol=tolerance(alphas_cumprod), atol=1e-6):
                    return config
    if ends_in_noise:
        betas = betas.clamp(max=1 - LEAST_ALPHA)  # rescaling sets the last abar to 0 again and leaves the others
    if bool(((betas > 0) & (betas < 1)).all()):
        return DiffusionConfig(num_timesteps=steps, betas=betas.tolist(), rescale_betas_zero_snr=ends_in_noise)
    return None


def schedule_buffers(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The schedule buffers (T,), float32, that CompVis's DDPM class registers."""
    betas, abar = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), abar[:-1]])
    variance = betas if schedule.variance == "beta" else betas * (1 - before) / (1 - abar)
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


def write(model: SavedModel, path: Path) -> None:
    """Write weights (also as EMA), schedule and first stage, and CompVis's config beside them as YAML.

    Raises:
        UserError: a pixel-space or class-conditional model, one that predicts v or its variance, one whose latents are
            clipped, an architecture that CompVis's code does not have, or a name that ends in .safetensors.
    """
    require_name(path, "compvis")
    require_eps_unet(model, "CompVis's code")
    require_plain_timesteps(model, "CompVis's code")
    _require_latents(model, path)
    _require_own_sampling(model)
    config = config_path(path)
    refuse_existing(config, "the config goes there; ")
    if model.node.params.get("channel_mult", [1])[0] != 1:
        raise UserError("format: in CompVis's code channel_mult begins with 1; choose safetensors")
    weights, codec = detached(model.network.state_dict()), model.codec()
    state = {f"{UNET}{name}": value for name, value in weights.items()}
    state |= {ema_name(name): value for name, value in weights.items()}
    steps = torch.tensor(int(model.info.get("step", 0)), dtype=torch.int, device="cpu")
    decay = torch.tensor(0.9999, dtype=torch.float32, device="cpu")
    state |= {"model_ema.decay": decay, "model_ema.num_updates": steps}
    state |= schedule_buffers(model.schedule)
    state |= {f"{PREFIX}{name}": value for name, value in detached(codec.autoencoder.state_dict()).items()}
    if codec.scale_factor != 1:
        state["scale_factor"] = torch.tensor(codec.scale_factor, dtype=torch.float32, device="cpu")
    content = {"epoch": 0, "global_step": int(steps), "pytorch-lightning_version": "1.4.2", "state_dict": state}
    write_torch(path, content)
    write_text(config, json.dumps(config_of(model), indent=2) + "\n")  # JSON is YAML


def _require_latents(model: SavedModel, path: Path) -> None:
    if not model.space.encoded:
        raise UserError("format: CompVis's latent diffusion has no pixel-space models; choose adm or safetensors")
    if model.num_classes is not None:
        raise UserError(
            "format: compvis holds unconditional models only, and this one takes labels; choose safetensors"
        )
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path}: is for the config; name the weights, for example {path.with_suffix('.ckpt')}")


def _require_own_sampling(model: SavedModel) -> None:
    """Refuse clipping and a learned variance, which CompVis's code lacks; name what its DDIM does in its own way."""
    params, diffusion, schedule = model.node.params, model.diffusion, model.schedule
    if params["out_channels"] != params["in_channels"]:
        raise UserError("format: CompVis's code has no learned variance; choose diffusers or safetensors")
    clipping = [key for key in ("clip_sample", "thresholding") if getattr(diffusion, key)]
    if clipping:
        raise UserError(f"format: CompVis's code has no {clipping[0]} of latents; choose diffusers or safetensors")
    own = {"timestep_spacing": (None, "leading"), "steps_offset": (1,), "set_alpha_to_one": (False,)}
    other = [f"{key}: {getattr(schedule, key)}" for key, known in own.items() if getattr(schedule, key) not in known]
    if other:
        logger.warning(f"CompVis's DDIM has timesteps of its own; not written: {', '.join(other)}")


def config_of(model: SavedModel) -> dict[str, Any]:
    """The `model` section that CompVis's scripts instantiate."""
    codec, params = model.codec(), dict(model.node.params)
    params.pop("num_classes", None)
    if params.get("num_head_channels", -1) == -1:
        params.setdefault("num_heads", 1)  # CompVis's code has no default
    stage = {**plain(codec.params), "lossconfig": {"target": "torch.nn.Identity"}}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                **_schedule_keys(model),
                "v_posterior": 1.0 if model.schedule.variance == "beta" else 0.0,
                "first_stage_key": "image",
                "image_size": params["image_size"],
                "channels": params["in_channels"],
                "scale_by_std": codec.scale_factor != 1,
                "scale_factor": codec.scale_factor,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": plain(params),
                },
                "first_stage_config": {"target": FIRST_STAGES[type(codec.autoencoder).__name__], "params": stage},
                "cond_stage_config": "__is_unconditional__",
            },
        }
    }


def _schedule_keys(model: SavedModel) -> dict[str, Any]:
    """The schedule by CompVis's name, or by its betas."""
    diffusion, steps = model.diffusion, {"timesteps": model.schedule.num_timesteps}
    if diffusion.betas is not None or diffusion.schedule not in THEIR_SCHEDULES:
        return {"given_betas": model.schedule.betas.tolist(), **steps}
    ends = {"linear_start": diffusion.beta_start, "linear_end": diffusion.beta_end}
    return {"beta_schedule": THEIR_SCHEDULES[diffusion.schedule], **ends, **steps}
