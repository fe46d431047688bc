"""Where a training leaves its weights: wrappers' prefixes, unusual keys, every EMA helper's form."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ldm_dkdm import UserError, load_model
from ldm_dkdm.checkpoints import Source, read, read_tensors
from ldm_dkdm.checkpoints.first_stages import FirstStageSource
from ldm_dkdm.diffusion.schedule import NoiseSchedule
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import DiT, UNet
from tests.parts import UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint

HINTS: dict[str, Any] = {"image_size": 8, "num_head_channels": 32, "use_new_attention_order": False}
PIXEL = {"schedule": "cosine", "space": "pixel"}
PARAMS = {**UNET_PARAMS, "attention_resolutions": [1], "channel_mult": [1]}
State = dict[str, Tensor]
Parts = tuple[UNet, VQModel, State]  # a network, a first stage, and both by CompVis's names


@cache
def network(seed: int) -> UNet:
    return randomised(UNet(**PARAMS), seed)


def raw() -> State:
    return copy.deepcopy(network(0).state_dict())


def averaged() -> State:
    return copy.deepcopy(network(1).state_dict())


def named(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: value for name, value in state.items()}


def inside(segment: str) -> State:
    """Names of blocks that were wrapped one by one."""
    return {name.replace("input_blocks.1.0.", f"input_blocks.1.0.{segment}."): v for name, v in raw().items()}


def loads(path: Path, state: Mapping[str, Tensor], **hints: Any) -> bool:
    found = load_model(path, **HINTS, **PIXEL, **hints).network.state_dict()
    return all(torch.equal(found[name], value) for name, value in state.items())


PREFIXES = ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "net.", "network.", "unet."]
PREFIXES += ["_forward_module.", "_forward_module.model.", "_fsdp_wrapped_module.", "model._fsdp_wrapped_module."]
PREFIXES += ["model._orig_mod.", "denoise_fn.", "system.anything.net._orig_mod.module."]
PREFIXES += ["module.module.", "diffusion_model."]


@pytest.mark.parametrize("key", [None, "state_dict"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_does_not_matter(prefix: str, key: str | None, tmp_path: Path) -> None:
    state: Any = {**named(prefix, raw()), "loss.weight": torch.zeros(1), "betas": torch.zeros(20)}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw())


@pytest.mark.parametrize("segment", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_blocks_that_were_wrapped_one_by_one_load(segment: str, tmp_path: Path) -> None:
    torch.save(named("model.", inside(segment)), tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw())


KEYS = ["model", "state_dict", "model_state_dict", "module", "net", "network", "unet", "params", "weights", "generator"]
KEYS += ["model_state", "denoiser", "diffusion", "G"]


@pytest.mark.parametrize("key", KEYS)
def test_the_name_of_the_state_dict_does_not_matter(key: str, tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.0}]}
    torch.save({key: raw(), "optimizer": optimizer, "opt": optimizer, "step": 3, "ema": None}, tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw())
    with pytest.raises(UserError, match="no EMA weights; set use_ema=false, or leave it out"):
        load_model(tmp_path / "x.pt", **HINTS, **PIXEL, use_ema=True)


@pytest.mark.parametrize("key", ["optim", "optim_g", "state"])
def test_the_moments_of_an_optimizer_are_no_weights(key: str, tmp_path: Path) -> None:
    moments = {name: {k: 0 * v for k, v in raw().items()} for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    torch.save({"model": raw(), key: moments}, tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw()) and read(Source(tmp_path / "x.pt")).ema is None


def litema() -> dict[str, Any]:
    ema = {"model_ema." + name.replace(".", ""): value for name, value in averaged().items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    return {"state_dict": {**named("model.", raw()), **ema, **counters}}


def lucidrains() -> dict[str, Any]:
    ema = {**named("online_model.", raw()), **named("ema_model.", averaged()), "initted": torch.tensor(True)}
    return {"step": 3, "model": raw(), "ema": {**ema, "step": torch.tensor(3)}}


MOMENTS = {"state": {0: {"exp_avg": torch.zeros(2), "step": 3}}, "param_groups": [{"params": [0]}]}

HELPERS: dict[str, Callable[[], Any]] = {
    "torch_ema": lambda: {"model": raw(), "ema": {"decay": 0.9, "shadow_params": list(averaged().values())}},
    "diffusers": lambda: {"unet": raw(), "ema_unet": {"decay": 0.9, "shadow_params": list(averaged().values())}},
    "a list": lambda: {"model": raw(), "ema_params": list(averaged().values())},
    "a tuple": lambda: {"model": raw(), "ema": tuple(averaged().values())},
    "shadow": lambda: {"model": raw(), "ema": {"decay": 0.9, "shadow": averaged()}},
    "its rate": lambda: {"model": raw(), "ema": {0.9999: averaged()}},
    "a list of one": lambda: {"model": raw(), "ema": [averaged()]},
    "EDM2": lambda: {"net": raw(), "ema": [{"std": 0.05, "net": averaged()}]},
    "Polyak": lambda: {"model": raw(), "polyak": averaged()},
    "an optimizer": lambda: {"model": raw(), "optimizer_states": [{"ema": averaged(), "opt": MOMENTS}]},
    "NeMo": lambda: {"model": raw(), "optimizer_states": [{"ema": tuple(averaged().values()), "opt": MOMENTS}]},
    "timm": lambda: {"state_dict": raw(), "state_dict_ema": named("module.", averaged())},
    "k-diffusion": lambda: {"model": raw(), "model_ema": averaged(), "opt": {}},
    "BasicSR": lambda: {"params": raw(), "params_ema": averaged()},
    "AveragedModel": lambda: {"model": raw(), "ema": dict(AveragedModel(network(1)).state_dict())},
    "lucidrains": lucidrains,
    "one state dict": lambda: {"state_dict": {**named("model.", raw()), **named("ema_model.", averaged())}},
    "LitEma": litema,
    "Lightning": lambda: {"state_dict": named("net.", averaged()), "current_model_state": named("net.", raw())},
}


@pytest.mark.parametrize("name", HELPERS)
def test_the_ema_of_a_helper_is_the_model_and_the_raw_weights_are_a_hint(name: str, tmp_path: Path) -> None:
    torch.save(HELPERS[name](), tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", averaged())
    assert loads(tmp_path / "x.pt", averaged(), use_ema=True)
    assert loads(tmp_path / "x.pt", raw(), use_ema=False)


def test_a_file_of_averaged_weights_alone_is_read(tmp_path: Path) -> None:
    averaging = dict(AveragedModel(network(1)).state_dict())
    for content in (averaging, {"ema": averaged()}, {"model_ema": averaged(), "opt": {"a": torch.zeros(1)}}):
        torch.save(content, tmp_path / "x.pt")
        assert loads(tmp_path / "x.pt", averaged())


@pytest.mark.parametrize("ema", [{"decay": 0.9}, {"shadow_params": [torch.zeros(2)]}, {"values": list(raw())}])
def test_an_ema_of_an_unknown_form_is_said_and_the_raw_weights_are_used(
    ema: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": raw(), "ema": ema}, tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw())
    assert "x.pt: the EMA weights in 'ema' have an unknown form; raw ones are used" in caplog.text
    assert loads(tmp_path / "x.pt", raw(), use_ema=False)


def test_an_ema_in_an_optimizer_that_does_not_fit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": raw(), "optimizer_states": [{"ema": (torch.zeros(2),), "opt": MOMENTS}]}, tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw())
    assert "the EMA weights in 'optimizer_states.0.ema' have an unknown form; raw ones are used" in caplog.text


def test_raw_weights_beside_an_ema_of_an_unknown_form_are_not_ema_by_their_files_name(tmp_path: Path) -> None:
    torch.save({"model": raw(), "ema": {"values": list(raw())}}, tmp_path / "ema_1.pt")
    assert load_model(tmp_path / "ema_1.pt", **HINTS, **PIXEL).info["weights_kind"] == "raw"


SEVERAL: list[Any] = [[averaged(), averaged()], {0.9: averaged(), 0.99: averaged()}]
SEVERAL += [{"stds": [0.05, 0.1], "emas": [averaged(), averaged()]}]  # EDM2's training state


@pytest.mark.parametrize("emas", SEVERAL)
def test_several_emas_are_refused_by_their_places_and_the_raw_weights_beside_them_taken(
    emas: object, tmp_path: Path
) -> None:
    torch.save({"model": raw(), "ema": emas}, tmp_path / "ema_1.pt")
    places = r"holds several networks \(ema(\.emas)?\.0(\.9)?, ema(\.emas)?\.[01](\.99)?\); save the wanted one alone"
    for wanted in (None, True):
        with pytest.raises(UserError, match=places + r".*, or set use_ema=false for the raw weights$"):
            load_model(tmp_path / "ema_1.pt", **HINTS, **PIXEL, use_ema=wanted)
    assert loads(tmp_path / "ema_1.pt", raw(), use_ema=False)
    assert load_model(tmp_path / "ema_1.pt", **HINTS, **PIXEL, use_ema=False).info["weights_kind"] == "raw"
    torch.save({"ema": emas}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=places + r": its state_dict\(\)$"):
        load_model(tmp_path / "x.pt", **HINTS, **PIXEL, use_ema=False)


def test_an_empty_ema_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": raw(), "ema": {}}, tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw()) and not caplog.text


def test_a_tensor_is_that_of_the_shard_that_the_index_names(tmp_path: Path) -> None:
    state, copy = raw(), {"out.2.bias": averaged()["out.2.bias"]}
    whole = dict(state)
    last = {"time_embed.0.bias": state.pop("time_embed.0.bias")}
    save_file(state, tmp_path / "model-00001-of-00002.safetensors")
    save_file({**last, **copy}, tmp_path / "model-00002-of-00002.safetensors")
    listed = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    listed |= dict.fromkeys(last, "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    found = read_tensors(tmp_path / "model.safetensors.index.json")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_several_networks_are_refused_by_their_places(tmp_path: Path) -> None:
    torch.save({"state_dict": {**named("first.", raw()), **named("second.", averaged())}}, tmp_path / "x.pt")
    places = r"several networks \(state_dict.first, state_dict.second\); save the wanted one"
    with pytest.raises(UserError, match=places):
        load_model(tmp_path / "x.pt", **HINTS, **PIXEL)
    torch.save({"state_dict": {**named("model.", raw()), **named("teacher.", averaged())}}, tmp_path / "y.pt")
    assert loads(tmp_path / "y.pt", raw())


def test_a_module_that_is_registered_twice_is_one_network(tmp_path: Path) -> None:
    both = nn.ModuleDict({"first": network(0), "second": network(0)})
    torch.save(both.state_dict(), tmp_path / "x.pt")
    assert loads(tmp_path / "x.pt", raw())


@pytest.mark.parametrize("keys", [("model", "ema"), ("net",)])
def test_a_dit_is_found_likewise(keys: tuple[str, ...], tmp_path: Path) -> None:
    nets = [randomised(DiT(input_size=8, hidden_size=32, depth=1, num_heads=2), seed) for seed in (0, 1)]
    states = [named("_orig_mod.module.", net.state_dict()) for net in nets]
    torch.save({"e": 1, **dict(zip(keys, states, strict=False))}, tmp_path / "x.pt")
    found = load_model(tmp_path / "x.pt", num_heads=2, **PIXEL)
    wanted = nets["ema" in keys].state_dict()
    assert all(torch.equal(found.network.state_dict()[name], value) for name, value in wanted.items())
    trained = {name: value for name, value in nets[1].state_dict().items() if name != "pos_embed"}
    torch.save({"model": states[0], "ema": {"shadow_params": list(trained.values())}}, tmp_path / "y.pt")
    found = load_model(tmp_path / "y.pt", num_heads=2, **PIXEL)
    assert all(torch.equal(found.network.state_dict()[name], value) for name, value in trained.items())


@pytest.fixture(scope="module")
def compvis(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    unet, vq = network(0), randomised(VQModel(**VQ_PARAMS))
    file = tmp_path_factory.mktemp("compvis") / "plain.ckpt"
    write_compvis_checkpoint(file, unet, vq, NoiseSchedule(num_timesteps=20))
    return unet, vq, torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.parametrize("prefix", ["module.", "_forward_module.", "_orig_mod.", "system."])
def test_compvis_s_names_behind_a_prefix_keep_their_schedule_ema_and_first_stage(
    prefix: str, compvis: Parts, tmp_path: Path
) -> None:
    unet, vq, state = compvis
    torch.save({"state_dict": named(prefix, state)}, tmp_path / "x.ckpt")
    inner = {k.replace("model.diffusion_model.", "model._orig_mod.diffusion_model."): v for k, v in state.items()}
    torch.save({"model_state_dict": inner}, tmp_path / "y.ckpt")
    hints = {"image_size": 8, "num_head_channels": 32}
    for name in ("x.ckpt", "y.ckpt"):
        model, raw_model = (load_model(tmp_path / name, **hints, use_ema=ema) for ema in (None, False))
        assert model.schedule.num_timesteps == 20 and model.format == "CompVis latent diffusion"
        assert torch.equal(model.network.out[2].weight, unet.out[2].weight)
        assert torch.equal(raw_model.network.out[2].weight, unet.out[2].weight + 1)
        assert torch.equal(model.codec().autoencoder.quant_conv.weight, vq.quant_conv.weight)


PLACES = ["module.diffusion_model.", "diffusion_model.module.", "_orig_mod.diffusion_model."]
PLACES += ["diffusion_model._orig_mod.", "diffusion_model._orig_mod.module.", "diffusion_model.net."]
PLACES += ["_orig_mod.module.diffusion_model._orig_mod."]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("outer", ["", "system."])
def test_a_unet_that_was_wrapped_within_compvis_s_names_keeps_its_ema(
    outer: str, place: str, compvis: Parts, tmp_path: Path
) -> None:
    (unet, vq, state), dotless = compvis, place.replace(".", "")
    names = {k: k.replace("model_ema.diffusion_model", f"model_ema.{dotless}") for k in state}
    names = {k: v.replace("model.diffusion_model.", f"model.{place}") for k, v in names.items()}
    torch.save({"state_dict": {outer + names[k]: value for k, value in state.items()}}, tmp_path / "x.ckpt")
    for ema, shift in ((None, 0), (False, 1)):
        model = load_model(tmp_path / "x.ckpt", image_size=8, num_head_channels=32, use_ema=ema)
        assert model.schedule.num_timesteps == 20 and model.format == "CompVis latent diffusion"
        assert torch.equal(model.network.out[2].weight, unet.out[2].weight + shift)
    assert torch.equal(model.codec().autoencoder.quant_conv.weight, vq.quant_conv.weight)


FIRST_STAGES = ["", "module.", "_orig_mod.", "model.", "model._orig_mod.", "first_stage_model."]
FIRST_STAGES += ["first_stage_model.module.", "first_stage_model._orig_mod."]


@pytest.mark.parametrize("prefix", FIRST_STAGES)
def test_a_first_stage_behind_a_prefix_loads_without_its_ema(prefix: str, tmp_path: Path) -> None:
    vq = randomised(VQModel(**VQ_PARAMS))
    state = {**named(prefix, vq.state_dict()), f"{prefix}loss.a": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    codec = FirstStageSource(tmp_path / "x.ckpt").codec(8)
    assert torch.equal(codec.autoencoder.quant_conv.weight, vq.quant_conv.weight)


def test_flat_shards_of_fsdp_are_named(tmp_path: Path) -> None:
    torch.save({"_fsdp_wrapped_module._flat_param": torch.zeros(9)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="FSDP's flat parameters"):
        read(Source(tmp_path / "x.pt"))
