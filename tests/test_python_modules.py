"""Runs from Python with modules of unusual kinds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm.config.schema import SamplingConfig
from ldm_dkdm.evaluation.samples import sampled
from ldm_dkdm.evaluation.sources import key_of
from ldm_dkdm.networks import DiT, UNet
from ldm_dkdm.networks.modes import compiled, replayed, stored_in_bf16
from tests.cli import contents
from tests.parts import UNET_PARAMS
from tests.test_python_api import NUMBERS, Net, same, weights

SHORT = {**NUMBERS, "steps": 2, "save_every": 2, "warmup": "noise"}


@pytest.fixture
def teacher(teacher_folder: Path) -> dkdm.DiffusionModel:
    return dkdm.load_model(teacher_folder)


class Normed(Net):
    """A network with batch norms, with buffers that calls replace or fill, and one that is a view of a weight."""

    seen: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("view", self.inner.weight.data)
        self.register_buffer("last", torch.zeros(0), persistent=False)
        self.register_buffer("first", None, persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
            self.last = x.detach()  # of another shape where the batch is another
            self.first = x.detach() if self.first is None else self.first
        return self.outer(torch.tanh(self.norm(self.inner(x))))


def test_a_saved_student_has_the_batch_statistics_of_the_training(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    whole, parts = (dkdm.DiffusionModel(Normed(), like=teacher) for _ in range(2))
    parts.network.load_state_dict(whole.network.state_dict())
    dkdm.distill(teacher, whole, tmp_path / "whole", **SHORT | {"steps": 4})
    dkdm.distill(teacher, parts, tmp_path / "parts", **SHORT)
    assert parts.network.norm.num_batches_tracked == 2
    dkdm.distill(teacher, parts, tmp_path / "parts", resume=True, **SHORT | {"steps": 4})
    assert same(weights(whole), weights(parts))
    for name in ("whole", "parts"):
        state = torch.load(tmp_path / name / "checkpoints" / "step=00000004.ckpt", weights_only=True)
        current, average = state["current_model_state"], state["state_dict"]
        saved = weights(dkdm.load_model(tmp_path / name, network=Normed()))
        for buffer in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "seen"):
            assert torch.equal(saved[buffer], current[f"network.{buffer}"])
        assert saved["norm.num_batches_tracked"] == saved["seen"] == 4
        assert not torch.equal(average["network.inner.weight"], current["network.inner.weight"])
        assert torch.equal(saved["view"], saved["inner.weight"])  # not the weight of the training


class Scaled(UNet):
    """A UNet whose output is doubled."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, t, label)


class ScaledDiT(DiT):
    """A DiT whose output is doubled."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, t, label)


class Scaling(Net):
    """A network of which the weights are only a part: it has an attribute, and a buffer that is not saved."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0, doubled: int = -1) -> None:
        super().__init__()
        self.scale, self.doubled = scale, doubled
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        scale = torch.where(t == self.doubled, 2 * self.scale, self.scale)[:, None, None, None]
        return scale * super().forward(x, t, label) + self.shift


def test_the_cache_tells_networks_of_the_same_weights_apart(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    hooked, plain = Scaling(), Scaling()
    hooked.register_forward_hook(lambda module, given, output: 2 * output)
    networks: list[nn.Module] = [plain, Scaling(scale=0.2), Scaling(shift=0.5), Scaling(doubled=3), hooked]
    for network in networks:
        network.load_state_dict(plain.state_dict())
    changed = UNet(**UNET_PARAMS)
    changed.out[0].eps = 1.0
    changed.load_state_dict(teacher.network.state_dict())
    models = [teacher, *(dkdm.DiffusionModel(network, like=teacher) for network in (changed, *networks))]

    keys = [key_of(sampled(model, SamplingConfig(count=2)).identity()) for model in models]
    assert len(set(keys)) == len(models)
    assert [key_of(sampled(model, SamplingConfig(count=2)).identity()) for model in models] == keys
    one, scaled = models[2:4]
    own = [dkdm.evaluate(one, model, images=0, chains=1, pairs=1, steps=1, cache=tmp_path) for model in (one, scaled)]
    assert own[0]["agreement"] < 1e-9 < own[1]["agreement"]


SAVED = ("folder", "safetensors", "diffusers", "compvis", "adm", "dit")
DIT = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False}


@pytest.mark.parametrize("network", [Scaled(**UNET_PARAMS), ScaledDiT(**DIT)], ids=["UNet", "DiT"])
def test_a_subclass_is_not_saved_as_the_plain_network(
    network: nn.Module, teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    model, kind = dkdm.DiffusionModel(network, like=teacher), type(network)
    for format in SAVED[2:]:
        with pytest.raises(dkdm.UserError, match=f"format: .* no {kind.__name__}; choose|holds a DiT .* choose"):
            model.save(tmp_path / "out", format)
    assert contents(tmp_path) == {}
    model.save(tmp_path / "model.safetensors", "safetensors")
    plain, stage = kind(**(UNET_PARAMS if isinstance(network, UNet) else DIT)), teacher.first_stage.path
    again = dkdm.load_model(tmp_path / "model.safetensors", network=plain, first_stage=stage)
    states = torch.randn(1, *model.shape)
    assert torch.equal(again.predict(states, 3).eps, model.predict(states, 3).eps)


def _replaced(network: UNet) -> None:
    network.out[1] = nn.ReLU()


def _patched(network: UNet) -> None:
    network.out.forward = network.out[2].forward


def _another_eps(network: UNet) -> None:
    network.out[0].eps = 1e-3


def _parametrized(network: UNet) -> None:
    torch.nn.utils.parametrizations.spectral_norm(network.out[2])


def _normed(network: UNet) -> None:
    torch.nn.utils.spectral_norm(network.out[2])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_replaced, "its out.1 is a ReLU instead of a SiLU"),
        (_patched, "its out has another forward"),
        (_another_eps, "its out.0 has eps 0.001 instead of 1e-05"),
        (_parametrized, "its out.2 is a ParametrizedConv2d instead of a Conv2d"),
        (_normed, "it lacks the tensor out.2.weight"),
    ],
)
def test_a_network_that_was_changed_is_not_saved_as_the_plain_one(
    change: Callable[[UNet], None], fault: str, teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    model = dkdm.DiffusionModel(UNet(**UNET_PARAMS), like=teacher)
    change(model.network)
    for format in SAVED[:-1]:
        with pytest.raises(dkdm.UserError, match=f"network: {fault}.* class Mine.UNet"):
            model.save(tmp_path / "out", format)
    with pytest.raises(dkdm.UserError, match=f"network: {fault}"):
        dkdm.distill(teacher, model, tmp_path / "run", **SHORT)
    assert contents(tmp_path) == {}


def test_a_hook_is_named_and_hinders_nothing(
    teacher: dkdm.DiffusionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dkdm.DiffusionModel(UNet(**UNET_PARAMS), like=teacher)
    model.network.out[1].register_forward_hook(lambda module, given, output: None)
    model.save(tmp_path / "out")
    assert "network: its out.1 has a forward hook, which no file holds" in caplog.text
    assert dkdm.load_model(tmp_path / "out").network.arguments == model.network.arguments


def test_wrapped_forwards_and_parts_without_weights_hinder_nothing(
    teacher: dkdm.DiffusionModel, tmp_path: Path
) -> None:
    model = dkdm.DiffusionModel(UNet(**UNET_PARAMS), like=teacher)
    model.network.criterion = nn.MSELoss()
    model.network.out.forward = torch.compile(model.network.out.forward)
    model.network.forward = torch.no_grad()(model.network.forward)
    model.save(tmp_path / "out")
    assert dkdm.load_model(tmp_path / "out").network.arguments == model.network.arguments


def test_what_the_package_does_to_networks_is_saved(teacher: dkdm.DiffusionModel, tmp_path: Path) -> None:
    network = stored_in_bf16(UNet(**UNET_PARAMS)).train()
    network.use_checkpoint = True
    network.out[2].weight = nn.Parameter(network.out[2].weight.clone(), requires_grad=False)
    with compiled([network], True), replayed(network, 2):
        for format in SAVED[:2]:
            dkdm.DiffusionModel(network, like=teacher).save(tmp_path / format, format)


def test_torchscript_is_refused(teacher: dkdm.DiffusionModel) -> None:
    traced = torch.jit.trace(Net(), (torch.zeros(1, 3, 8, 8), torch.zeros(1)))
    scripted = torch.jit.script(nn.Conv2d(3, 3, 1))
    for network in (traced, scripted):
        with pytest.raises(dkdm.UserError, match="network: is TorchScript; give the module that was traced"):
            dkdm.DiffusionModel(network, like=teacher)
        with pytest.raises(dkdm.UserError, match="network: is TorchScript"):
            teacher.changed(network=network)
