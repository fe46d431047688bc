"""Wrong arguments of Python calls end in one `UserError` that names the argument; clear ones are taken."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm.config.schema import DiffusionConfig, DiffusionRun, FirstStageRun
from ldm_dkdm.networks import DiT, UNet
from tests.parts import UNET_PARAMS, randomised

SCHEDULE = dkdm.NoiseSchedule("cosine", 20)
FEW = {"steps": 1, "batch_size": 2, "rho": 0.5}
IMAGES = np.zeros((4, 8, 8, 3), np.uint8)
X, T = torch.zeros(2, 3, 8, 8), torch.tensor([0, 19])


def dit() -> DiT:
    return DiT(8, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=3, learn_sigma=False)


def model(network: nn.Module | None = None) -> dkdm.DiffusionModel:
    return dkdm.DiffusionModel(dit() if network is None else network, schedule=SCHEDULE, space="pixel", shape=(3, 8, 8))


def conditional() -> dkdm.DiffusionModel:
    """The null label is a row of the table."""
    return model(UNet(**UNET_PARAMS, num_classes=4)).changed(null_label=3)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "module": (lambda: dkdm.distill(model(), dit(), "x", steps=1), "student: expected a DiffusionModel.*like="),
    "path": (lambda: dkdm.distill("x", model(), "x", steps=1), "teacher: expected a DiffusionModel.*load_model"),
    "out": (lambda: dkdm.distill(model(), model(), None, steps=1), "out: expected a path, got None"),
    "trained": (lambda: dkdm.train(dit(), "x", "x", steps=1), "model: expected a DiffusionModel"),
    "evaluated": (lambda: dkdm.evaluate("x", model()), "student: expected a DiffusionModel"),
    "list": (lambda: dkdm.measure([1], [1], features="pixels"), "samples: expected a DiffusionModel, images"),
    "load": (lambda: dkdm.load_model(None), "path: expected a path, got None"),
    "function": (lambda: model(lambda x, t, label=None: x), "network: expected an nn.Module"),
    "lazy": (lambda: model(nn.LazyConv2d(3, 1)), "network: it has lazy layers"),
    "stepz": (lambda: dkdm.distill(model(), model(), "x", stepz=3), "stepz: unknown argument; did you mean 'steps'"),
    "config": (
        lambda: dkdm.train_first_stage("ffhq256", "x"),
        "config: expected FirstStageRun, got .* type str",
    ),
    "out of a first stage": (
        lambda: dkdm.train_first_stage(dkdm.load_config("emoji64_first_stage", schema=FirstStageRun), None),
        "out: expected a path, got None",
    ),
    "other config": (
        lambda: dkdm.distill(model(), model(), "x", config=dkdm.load_config("celeba64_data", schema=DiffusionRun)),
        "config: expected DistillRun, got a value of type DiffusionRun",
    ),
    "resume": (lambda: dkdm.distill(model(), model(), "x", resume="yes", **FEW), "resume: expected True or False"),
    "progress": (lambda: dkdm.distill(model(), model(), "x", progress="bar", **FEW), "progress: expected True, False"),
    "signals": (
        lambda: dkdm.train(model(), "x", "x", signals=2, steps=1, batch_size=1),
        "signals: expected signals",
    ),
    "idle": (
        lambda: dkdm.distill(model(), model(), "x", discard_mode="same_slots", **FEW),
        "^discard_mode: has no effect without discard",
    ),
    "idle share": (
        lambda: dkdm.train(model(), {"synthetic": "s.npz", "fraction": 0.5}, "x", steps=1, batch_size=1),
        "^data.fraction: has no effect without path",
    ),
    "report": (lambda: dkdm.write_report("nowhere/x", "r.html"), "nowhere/x"),
    "no label": (lambda: model().predict(X, T), "label: missing"),
    "label": (lambda: model().predict(X, T, torch.tensor([0, 7])), r"label: 7 is outside 0 \.\.\. 3"),
    "t": (lambda: model().predict(X, torch.tensor([0, -1]), T * 0), r"t: -1 is outside 0 \.\.\. 19"),
    "betas": (lambda: dkdm.NoiseSchedule(betas=[0.1, 0.2], num_timesteps=5), "num_timesteps: 5 is not the number of b"),
    "one beta": (
        lambda: dkdm.NoiseSchedule(betas=torch.tensor(0.1), num_timesteps=5),
        r"betas: \(\) values must be one",
    ),
    "zero snr": (
        lambda: dkdm.NoiseSchedule(rescale_betas_zero_snr="no"),
        "rescale_betas_zero_snr: expected true or false, got 'no'",
    ),
    "idle end": (lambda: dkdm.NoiseSchedule(betas=[0.1, 0.2], beta_start=0.3), "beta_start: has no effect beside bet"),
    "idle name": (lambda: dkdm.NoiseSchedule("linear", betas=[0.1, 0.2]), "name: has no effect beside betas"),
    "cosine": (lambda: dkdm.NoiseSchedule("cosine", beta_end=0.1), "beta_end: has no effect with the cosine schedule"),
    "offset": (lambda: dkdm.NoiseSchedule(steps_offset=7), "steps_offset: must be 0 or 1, got 7"),
    "offset's kind": (lambda: dkdm.NoiseSchedule(steps_offset="a"), "steps_offset: expected a whole number, got 'a'"),
    "end": (lambda: dkdm.NoiseSchedule(set_alpha_to_one="yes"), "set_alpha_to_one: expected true or false, got 'yes'"),
    "uint8": (lambda: model().predict(X.byte(), T, T * 0), r"x: expected states as float32 numbers, got torch.uint8"),
    "sides": (lambda: model(UNet(**UNET_PARAMS)).predict(X[..., :7], T), "x: its sides must be multiples of 2 for"),
    "NaN": (lambda: model().predict(X, T * float("nan"), T * 0), "t: expected whole numbers, got nan"),
    "part": (lambda: model().predict(X, T + 0.7, T * 0), "t: expected whole numbers, got 0.7"),
    "no row": (lambda: conditional().predict(X, T, 4), r"label: 4 is outside 0 \.\.\. 3"),
    "array": (lambda: dkdm.train(model(), X, "x", steps=1, batch_size=1), "data: expected a folder.* numpy.savez"),
    "no data": (lambda: dkdm.train(model(), None, "x", steps=1, batch_size=1), "data: expected a folder.*got None"),
    "no signal": (
        lambda: dkdm.distill(model(), model(), "x", signals=[999], **FEW),
        "signals: 999 is not a signal",
    ),
    "metrics": (lambda: dkdm.measure(IMAGES, IMAGES, features="pixels", metrics=3), "metrics: expected names, got 3"),
    "no metrics": (lambda: dkdm.measure(IMAGES, IMAGES, features="pixels", metrics=[]), r"metrics: expected .*\[\]"),
    "device": (lambda: dkdm.measure(IMAGES, IMAGES, features="pixels", device="gpu"), "device: 'gpu' cannot be used"),
    "cache": (
        lambda: dkdm.measure(IMAGES, IMAGES, features="pixels", metrics="kid", cache=3),
        "cache: expected a path",
    ),
    "schedule": (lambda: dkdm.DiffusionModel(dit(), schedule="cosine"), "schedule: expected a NoiseSchedule"),
    "info": (lambda: dkdm.DiffusionModel(dit(), space="pixel", info=3), "info: expected facts by name"),
    "no config": (lambda: dkdm.load_config(None), "base: expected a path or name, or a list of them"),
    "nowhere": (lambda: model().save(None), "path: expected a path, got None"),
    "no page": (lambda: dkdm.write_report("nowhere/x", None), "out: expected a path, got None"),
    "x": (lambda: model().predict(X[:, :2], T, T * 0), r"x: expected states \(B,3,H,W\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_argument_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = MISTAKES[name]
    with pytest.raises(dkdm.UserError, match=words):
        call()
    assert not list(tmp_path.iterdir())


def test_numbers_for_all_states_float64_states_and_arrays_are_taken(tmp_path: Path) -> None:
    own = model()
    nn.init.normal_(own.network.final_layer.linear.weight)
    whole = own.predict(X + 1, torch.tensor([3, 3]), torch.tensor([1, 1]))
    assert torch.equal(own.predict(X.double() + 1, 3, 1).eps, whole.eps)
    images = np.random.default_rng(0).integers(256, size=(2, 70, 8, 8, 3), dtype=np.uint8)
    found = [
        dkdm.measure(*sets, metrics=metrics, features="pixels", cache=tmp_path).figures
        for sets, metrics in ((images, "kid"), (torch.from_numpy(images), ["kid"]))
    ]
    assert found[0] == found[1]
    np.savez(tmp_path / "x.npz", arr_0=np.moveaxis(images[0], -1, 1))
    with pytest.raises(dkdm.UserError, match=r"x.npz: arr_0 is uint8 \(70, 3, 8, 8\), which looks like \(N,C,H,W\)"):
        dkdm.measure(tmp_path / "x.npz", images[1], metrics="kid", features="pixels", cache=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_and_states_of_another_number_format_are_taken(dtype: torch.dtype) -> None:
    """Only the network computes in its format: x_0 follows from the state and eps in float32, where abar_t is small."""
    schedule = dkdm.NoiseSchedule("linear", 1000)
    process = DiffusionConfig("linear", 1000, space="pixel", clip_sample=False)
    exact, other = (
        model(randomised(UNet(**UNET_PARAMS)).to(kind)).changed(diffusion=process) for kind in (torch.float32, dtype)
    )
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 999.0])
    want, abar = exact.predict(x, t), schedule.alpha_bar(t, x)
    rounded = x.to(dtype).float()
    for found, state in ((exact.predict(x.to(dtype), t), rounded), (other.predict(x, t), x)):
        assert found.eps.dtype == found.x_0.dtype == torch.float32
        torch.testing.assert_close(found.eps, want.eps, rtol=0, atol=0.02 * float(want.eps.abs().max()))
        x_0 = (state - (1 - abar).sqrt() * found.eps) / abar.sqrt()
        torch.testing.assert_close(found.x_0, x_0.float(), rtol=1e-4, atol=1e-3)
    assert other.sample(2, steps=2).dtype == torch.uint8


def test_a_node_says_what_its_network_predicts() -> None:
    teacher = model().changed(parameterization="v")
    assert dkdm.DiffusionModel(dit(), like=teacher, node=teacher.node).parameterization == "v"


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda network: torch.compile(network, backend="eager"),  # type: ignore[return-value]
    "parallel": nn.DataParallel,
    "both": lambda network: nn.DataParallel(torch.compile(network, backend="eager")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_network_is_taken_without_its_wrapper(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = dit()
    nn.init.normal_(network.final_layer.linear.weight)
    own = model(WRAPPED[name](network))
    assert own.network is network and "DiT is taken without the" in caplog.text
    assert own.changed(network=WRAPPED[name](network)).network is network
    own.save(tmp_path / "x")
    want = model(network).predict(X + 1, T, T * 0).eps
    assert want.abs().min() > 0
    for given in (None, WRAPPED[name](dit())):
        assert torch.equal(dkdm.load_model(tmp_path / "x", network=given).predict(X + 1, T, T * 0).eps, want)


def test_a_network_with_a_compiled_block_is_saved_and_opened(tmp_path: Path) -> None:
    network = dit()
    nn.init.normal_(network.final_layer.linear.weight)
    want = model(network).predict(X + 1, T, T * 0).eps
    network.blocks[0] = torch.compile(network.blocks[0], backend="eager")  # type: ignore[assignment]
    model(network).save(tmp_path / "x")
    for given in (None, dit(), network):
        own = dkdm.load_model(tmp_path / "x", network=given)
        torch.testing.assert_close(own.predict(X + 1, T, T * 0).eps, want)


def test_numpys_numbers_are_taken(tmp_path: Path) -> None:
    two = np.int64(2)
    own = model(UNet(**{**UNET_PARAMS, "image_size": np.int64(8), "channel_mult": np.array([1, 2])}))
    assert own.shape == (3, 8, 8) and own.node.params["channel_mult"] == [1, 2]
    own.save(tmp_path / "x.pt", "adm")
    hints = {"image_size": np.int64(8), "num_head_channels": np.int64(32), "channel_mult": np.array([1, 2])}
    process = {"schedule": "cosine", "num_timesteps": np.int64(20), "space": "pixel"}
    opened = dkdm.load_model(tmp_path / "x.pt", **hints, **process, use_new_attention_order=np.bool_(False))
    opened.save(tmp_path / "x")
    other = own.changed(network=randomised(UNet(**own.node.params)))
    sizes = {"images": np.int64(0), **dict.fromkeys(("chains", "pairs", "steps", "seed", "batch_size"), two)}
    plain = {key: int(value) for key, value in sizes.items()}
    found = dkdm.evaluate(other, opened, cache=tmp_path / "c", **sizes)["agreement"]
    assert found == dkdm.evaluate(other, opened, cache=tmp_path / "d", **plain)["agreement"] > 0


def test_a_schedule_of_numpys_numbers_makes_a_model() -> None:
    given = {"steps_offset": np.int64(1), "set_alpha_to_one": np.bool_(True), "rescale_betas_zero_snr": np.bool_(True)}
    schedule = dkdm.NoiseSchedule("linear", np.int64(20), np.float32(0.01), np.float64(0.02), **given)
    own = dkdm.DiffusionModel(dit(), schedule=schedule, space="pixel", parameterization="v")
    assert own.diffusion == DiffusionConfig(
        "linear", 20, float(np.float32(0.01)), 0.02, "pixel", **{key: value.item() for key, value in given.items()}
    )


def test_one_override_is_taken_as_text() -> None:
    assert dkdm.load_config("ffhq256", "trainer.max_steps=7").trainer.max_steps == 7


class Recording(nn.Module):
    """A network that hands over a record, as diffusers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> object:
        return type("Output", (), {"sample": self.inner(x)})()


def test_the_record_of_a_network_is_opened_in_every_call() -> None:
    own = model(Recording())
    with torch.no_grad():
        assert torch.equal(own.predict(X + 1, T).eps, own.network(X + 1, T).sample)


def test_samples_are_the_same_under_another_default_dtype_and_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model()
    nn.init.normal_(own.network.final_layer.linear.weight)
    usual = own.sample(2, steps=2)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(own.sample(2, steps=2), usual)
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "stderr", None)
    assert torch.equal(own.sample(2, steps=2, progress=True), usual)
