"""The paper's latent recipes (Tab. 7) at their full size, on the meta device: nothing is computed."""

import pytest
import torch
import yaml
from torch import nn

from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.config.load import load_config, parse
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DistillRun, NetworkConfig
from ldm_dkdm.distillation.pool import pool_slots
from ldm_dkdm.first_stage import FIRST_STAGES
from ldm_dkdm.networks import NETWORKS
from tests.cli import ROOT

TABLE_7 = {
    "ffhq256": {"batch_size": 42, "iterations": 640_000, "learning_rate": 8.4e-5, "slots": 168_000},
    "celebahq256": {"batch_size": 48, "iterations": 410_000, "learning_rate": 9.6e-5, "slots": 192_000},
}
UNETS = {"teacher": (224, 274), "student": (128, 86)}  # channels, millions of parameters

COMPVIS = """
unet_config:
  target: ldm.modules.diffusionmodules.openaimodel.UNetModel
  params:
    image_size: 64
    in_channels: 3
    out_channels: 3
    model_channels: 224
    attention_resolutions: [8, 4, 2]
    num_res_blocks: 2
    channel_mult: [1, 2, 3, 4]
    num_head_channels: 32
    use_checkpoint: true
    legacy: false
    use_spatial_transformer: false
"""
COMPVIS_VQ = """
target: ldm.models.autoencoder.VQModelInterface
params:
  embed_dim: 3
  n_embed: 8192
  monitor: val/rec_loss
  ddconfig: {double_z: false, z_channels: 3, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
             ch_mult: [1, 2, 4], num_res_blocks: 2, attn_resolutions: [], dropout: 0.0}
  lossconfig: {target: torch.nn.Identity}
"""


def recipe(name: str) -> DistillRun:
    return load_config(ROOT / "configs" / f"{name}.yaml")


def on_meta(node: object) -> nn.Module:
    with torch.device("meta"):
        return build(node, {**NETWORKS, **FIRST_STAGES})


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", TABLE_7)
def test_the_training_values_are_those_of_table_7(name: str) -> None:
    config, wanted = recipe(name), TABLE_7[name]
    assert config.distill.batch_size == wanted["batch_size"]
    assert config.trainer.max_steps == wanted["iterations"]
    assert config.trainer.learning_rate == wanted["learning_rate"]
    assert config.trainer.lr_schedule == "constant" and config.trainer.grad_clip is None
    assert config.distill.rho == 4 and config.distill.stride == 1 and config.distill.loss.space == "eps"
    assert pool_slots(4, config.diffusion.num_timesteps, config.distill.batch_size) == wanted["slots"]


@pytest.mark.parametrize("name", TABLE_7)
@pytest.mark.parametrize("role", UNETS)
def test_the_networks_are_those_of_table_7(name: str, role: str) -> None:
    node = getattr(recipe(name), role)
    channels, millions = UNETS[role]
    params = node.params
    assert params["model_channels"] == channels and params["num_res_blocks"] == 2
    assert params["channel_mult"] == [1, 2, 3, 4] and params["num_head_channels"] == 32
    assert [params["image_size"] // factor for factor in params["attention_resolutions"]] == [32, 16, 8]
    assert (params["in_channels"], params["image_size"]) == (3, 64)
    count = sum(p.numel() for p in on_meta(node).parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.002 if role == "teacher" else 0.05)


@pytest.mark.parametrize("name", TABLE_7)
def test_the_process_and_the_first_stage_are_those_of_table_7(name: str) -> None:
    config = recipe(name)
    schedule = schedule_of(config.diffusion)
    assert schedule.num_timesteps == 1000
    middle = (0.0015**0.5 + (0.0195**0.5 - 0.0015**0.5) * 500 / 999) ** 2  # LDM's "linear" is linear in sqrt(beta)
    assert schedule.betas[500].item() == pytest.approx(middle, rel=1e-12)
    vq = on_meta(config.first_stage)
    assert vq.downsampling == 4 and vq.embed_dim == 3 and vq.quantize.n_e == 8192
    assert config.first_stage.params["ddconfig"]["resolution"] // vq.downsampling == 64


def test_a_unet_pasted_from_compvis_is_the_teacher_of_the_recipe() -> None:
    pasted = parse(NetworkConfig, yaml.safe_load(COMPVIS), "teacher")
    network = on_meta(pasted)
    assert shapes(network) == shapes(on_meta(recipe("ffhq256").teacher))
    assert network.use_checkpoint


def test_a_first_stage_pasted_from_compvis_is_that_of_the_recipe() -> None:
    pasted = on_meta(yaml.safe_load(COMPVIS_VQ))
    assert shapes(pasted) == shapes(on_meta(recipe("ffhq256").first_stage))
