"""Small real parts for the tests: networks, model folders, checkpoints in foreign layouts."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ldm_dkdm import DiffusionModel
from ldm_dkdm.checkpoints.compvis import UNET, ema_name
from ldm_dkdm.checkpoints.first_stages import PREFIX as FIRST_STAGE
from ldm_dkdm.checkpoints.model_folder import write_folder
from ldm_dkdm.config.schema import DiffusionConfig, FirstStageCard, FirstStagePointer, ModelCard, NetworkConfig
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet

UNET_PARAMS = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 32,
}
LDM = {  # without model_channels: 224 in the paper's teacher, 128 in its student
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 2,
    "attention_resolutions": [2, 4, 8],
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
}
DDCONFIG = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "in_channels": 3,
    "resolution": 32,
    "z_channels": 3,
    "double_z": False,
    "dropout": 0.0,
}
VQ_PARAMS = {"ddconfig": DDCONFIG, "n_embed": 64, "embed_dim": 3}
DIFFUSION = DiffusionConfig(num_timesteps=20)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where networks start at zero, so that outputs say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def first_stage_folder(folder: Path, channels: int = 3, weight: float = 1.0) -> Path:
    """A first-stage folder: 32x32 images, 8x8x3 latents, 64 codes; its weights are random, times `weight`."""
    params = {**VQ_PARAMS, "ddconfig": {**DDCONFIG, "in_channels": channels, "out_ch": channels}}
    card = FirstStageCard("model.safetensors", "ldm_dkdm.first_stage.VQModel", params, 0.5)
    state = randomised(VQModel(**params)).state_dict()
    write_folder(folder, card, {name: weight * tensor for name, tensor in state.items()})
    return folder


def model_folder(folder: Path, first_stage: Path, parameterization: str = "eps", **params: object) -> Path:
    """A denoiser's folder on 8x8x3 latents with T = 20."""
    node = NetworkConfig("ldm_dkdm.networks.UNet", {**UNET_PARAMS, **params}, parameterization)
    pointer = FirstStagePointer(str(first_stage.resolve()), 0.5)
    network = randomised(UNet(**node.params), seed=1)
    write_folder(folder, ModelCard("model.safetensors", node, DIFFUSION, pointer), network.state_dict())
    return folder


@torch.no_grad()
def of_few_timesteps(model: DiffusionModel, count: int) -> DiffusionModel:
    """A model of a UNet with `count` of its timesteps, at even distances; its predictions are those of the model there.

    Its time embedding has new weights: the first layer's are random, the last layer's map them to what the model's own
    embedding gives at those timesteps.
    """
    network, t = copy.deepcopy(model.network), torch.arange(count)
    every = model.schedule.num_timesteps // count
    wanted = network.time_embed(network.embedding(every * t))
    first, activation, last = network.time_embed
    first.weight.normal_(generator=torch.Generator().manual_seed(0))
    hidden = activation(first(network.embedding(t)))
    last.weight.copy_(torch.linalg.lstsq(hidden.double(), (wanted - last.bias).double()).solution.T)
    kept = model.schedule.alphas_cumprod[::every]
    betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
    few = model.changed(network=network, diffusion=replace(model.diffusion, num_timesteps=count, betas=betas.tolist()))
    x = torch.randn(count, *model.shape)
    torch.testing.assert_close(few.predict(x, t).eps, model.predict(x, every * t).eps, rtol=0, atol=1e-4)
    return few


def write_compvis_checkpoint(path: Path, unet: nn.Module, first_stage: nn.Module, schedule: NoiseSchedule) -> Path:
    """A file in the layout of CompVis's releases: raw weights, EMA under dotless names, first stage, buffers.

    The EMA weights are the network's own; the raw ones are shifted by 1, so that a test can tell them apart.
    """
    state = {f"{UNET}{name}": value + 1 for name, value in unet.state_dict().items()}
    state |= {ema_name(name): value for name, value in unet.state_dict().items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state |= {"betas": schedule.betas.float(), "alphas_cumprod": schedule.alphas_cumprod.float()}
    state |= {f"{FIRST_STAGE}{name}": value for name, value in first_stage.state_dict().items()}
    torch.save({"epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.2", "state_dict": state}, path)
    return path


def distill_config(teacher: Path, logs: Path, **sections: dict[str, object]) -> dict[str, object]:
    """A distillation of a `model_folder` that takes seconds; sections override keys."""
    config: dict[str, dict[str, object]] = {
        "teacher": {"ckpt": str(teacher), "check": False},
        "student": {"target": "ldm_dkdm.networks.UNet", "parameterization": "v", "params": dict(UNET_PARAMS)},
        "distill": {
            "batch_size": 4,
            "rho": 0.5,
            "warmup": {"mode": "ddim", "steps": 5, "images": 8, "batch_size": 4},
        },
        "trainer": {"max_steps": 6, "learning_rate": 1e-3, "precision": "32", "accelerator": "cpu", "ema_decay": 0.9},
        "logging": {
            "dir": str(logs),
            "name": "run",
            "save_every": 3,
            "sample_every": 3,
            "sample_count": 2,
            "sample_steps": 2,
            "evaluate_every": 0,
        },
    }
    for name, section in sections.items():
        config.setdefault(name, {}).update(section)
    return config
