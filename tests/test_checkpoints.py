"""What loads out of a checkpoint, and under which names."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_dkdm import UserError
from ldm_dkdm.checkpoints import Hints, Source, compvis, read, read_tensors
from ldm_dkdm.checkpoints.contents import schedule_of
from ldm_dkdm.checkpoints.first_stages import tensors_of
from ldm_dkdm.checkpoints.loading import load_strictly
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.config.schema import DistillConfig, DistillRun, NetworkConfig, TeacherConfig, TrainerConfig
from ldm_dkdm.first_stage import VQModel
from ldm_dkdm.networks import UNet
from tests.parts import DIFFUSION, UNET_PARAMS, VQ_PARAMS, randomised, write_compvis_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [TENSORS, {"state_dict": TENSORS, "epoch": 3, "optimizer_states": [{}]}])
def test_tensors_come_out_of_a_pickled_checkpoint(tmp_path: Path, content: dict[str, object], zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert _equal(read_tensors(path), TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_that_is_called_safetensors_opens(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "x.safetensors", _use_new_zipfile_serialization=zipped)
    assert _equal(read_tensors(tmp_path / "x.safetensors"), TENSORS)


def test_tensors_come_out_of_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert _equal(read_tensors(tmp_path / "model.safetensors"), TENSORS)


def test_a_run_folder_means_the_model_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {}\n")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a run that has written no model"):
        read_tensors(tmp_path)
    (tmp_path / "checkpoints" / "step=000001.ckpt").touch()
    save_file({"other": torch.ones(1)}, tmp_path / "agreement.safetensors")
    with pytest.raises(UserError, match="is a run that has written no model"):
        read_tensors(tmp_path)
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.yaml").write_text("network: {}\nweights: student.safetensors\n")
    save_file(TENSORS, student / "student.safetensors")
    save_file({"other": torch.ones(1)}, student / "other.safetensors")
    assert _equal(read_tensors(tmp_path), TENSORS) and _equal(read_tensors(student), TENSORS)


@pytest.mark.parametrize(
    "config",
    [
        "trainer: {}\nmodel: {}\n",
        "- 1\n",
        "a: [\n",
        "weights: ${foo}\n",
        "weights: imagenet\nnetwork: resnet\n",
        "weights: other.pt\n",
    ],
)
def test_the_config_of_another_code_beside_weights_does_no_harm(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pt")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert _equal(read_tensors(tmp_path), TENSORS)


def test_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"other": torch.ones(1)}, "ema": TENSORS}, tmp_path / "model.ckpt")
    assert _equal(read_tensors(tmp_path / "model.ckpt", "ema"), TENSORS) and _equal(
        read_tensors(tmp_path, "ema"), TENSORS
    )
    for path in (tmp_path, tmp_path / "model.ckpt"):
        with pytest.raises(UserError, match=r"no part 'nonsense' with tensors; it has state_dict, ema"):
            read_tensors(path, part="nonsense")
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="leave part out"):
        read_tensors(tmp_path / "x.safetensors", part="ema")


def test_callbacks_keyed_by_lightnings_class_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytorch_lightning.callbacks.model_checkpoint"
    key = type("ModelCheckpoint", (), {"__module__": name})
    fake = ModuleType(name)
    fake.ModelCheckpoint = key
    path = tmp_path / "model.ckpt"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, fake)
        torch.save({"callbacks": {key: {"best_model_score": torch.tensor(1.0)}}, "state_dict": TENSORS}, path)
    assert name.encode() in path.read_bytes()
    assert _equal(read_tensors(path), TENSORS)


def test_strict_loading_lists_all_that_does_not_fit() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tensors = {**module.state_dict(), "0.weight": torch.zeros(3, 2), "2.weight": torch.zeros(1)}
    del tensors["1.bias"]
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(UserError) as error:
        load_strictly(module, tensors, "model.ckpt")
    for part in ("model.ckpt", "missing: 1.bias", "unexpected: 2.weight", "0.weight (3, 2) instead of (2, 2)"):
        assert part in str(error.value)
    assert all(map(torch.equal, before, module.parameters()))


def test_loading_casts_to_the_modules_type() -> None:
    module = nn.Linear(2, 2)
    load_strictly(module, {"weight": torch.eye(2).half(), "bias": torch.tensor([1.0, 2.0]).half()}, "model.ckpt")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module(torch.ones(2)), torch.tensor([2.0, 3.0]))


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return randomised(UNet(**UNET_PARAMS))


@pytest.fixture(scope="module")
def vq() -> nn.Module:
    return randomised(VQModel(**VQ_PARAMS))


@pytest.fixture(scope="module")
def compvis_file(tmp_path_factory: pytest.TempPathFactory, unet: nn.Module, vq: nn.Module) -> Path:
    return write_compvis_checkpoint(tmp_path_factory.mktemp("compvis") / "model.ckpt", unet, vq, schedule_of(DIFFUSION))


@pytest.mark.parametrize(("choice", "shift"), [({}, 0), ({"use_ema": True}, 0), ({"use_ema": False}, 1)])
def test_a_compvis_teacher_has_the_ema_weights_by_default(
    compvis_file: Path, unet: nn.Module, choice: dict[str, bool], shift: int
) -> None:
    teacher = TeacherConfig(str(compvis_file), "ldm_dkdm.networks.UNet", UNET_PARAMS, **choice)
    student = NetworkConfig("ldm_dkdm.networks.UNet", UNET_PARAMS)
    run = DistillRun(teacher, student, DistillConfig(4, rho=0.5), TrainerConfig(1, 1e-3), diffusion=DIFFUSION)
    loaded = open_teacher(run).network.state_dict()
    assert _equal(loaded, {name: value + shift for name, value in unet.state_dict().items()})


def test_a_schedule_that_the_checkpoint_was_not_trained_with_is_refused_with_both(compvis_file: Path) -> None:
    teacher = TeacherConfig(str(compvis_file), "ldm_dkdm.networks.UNet", UNET_PARAMS)
    for wrong in (replace(DIFFUSION, schedule="linear"), replace(DIFFUSION, num_timesteps=21)):
        config = DistillRun(
            teacher, NetworkConfig("", {}), DistillConfig(1, rho=1.0), TrainerConfig(1, 1.0), diffusion=wrong
        )
        stored, configured = (schedule_of(d).alphas_cumprod[-1].item() for d in (DIFFUSION, wrong))
        with pytest.raises(UserError, match=rf"T = 20.*{stored:.6f}.*T = {wrong.num_timesteps}.*{configured:.6f}"):
            open_teacher(config)


def test_ema_names_have_no_dots() -> None:
    assert (
        compvis.ema_name("input_blocks.1.0.in_layers.0.weight")
        == "model_ema.diffusion_modelinput_blocks10in_layers0weight"
    )


def _without(file: Path, prefix: str, to: Path) -> Path:
    """The checkpoint without the tensors whose names begin with a prefix."""
    torch.save({"state_dict": {k: v for k, v in read_tensors(file).items() if not k.startswith(prefix)}}, to)
    return to


def test_a_checkpoint_without_ema_gives_the_raw_weights_unless_ema_is_asked_for(
    compvis_file: Path, unet: nn.Module, tmp_path: Path
) -> None:
    contents = read(Source(_without(compvis_file, "model_ema.", tmp_path / "raw.ckpt")))
    expected = {name: value + 1 for name, value in unet.state_dict().items()}
    assert _equal(dict(contents.weights(Hints())), expected)
    assert _equal(dict(contents.weights(Hints(use_ema=False))), expected)
    with pytest.raises(UserError, match="use_ema=false"):
        contents.weights(Hints(use_ema=True))


def test_a_missing_ema_weight_is_named_and_taken_raw(
    compvis_file: Path, unet: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, name = _without(compvis_file, compvis.ema_name("out.2.bias"), tmp_path / "part.ckpt"), "out.2.bias"
    found, own = read(Source(file)).weights(Hints(use_ema=True)), unet.state_dict()
    assert _equal(dict(found), {**own, name: own[name] + 1})
    assert f"{len(own) - 1} of {len(own)} tensors; the others (out.2.bias) are taken as they are" in caplog.text


def test_the_first_stage_comes_out_of_a_compvis_file_without_its_loss(compvis_file: Path, vq: nn.Module) -> None:
    tensors = {**read_tensors(compvis_file), "first_stage_model.loss.logvar": torch.zeros(1)}
    assert _equal(tensors_of(tensors), dict(vq.state_dict()))
