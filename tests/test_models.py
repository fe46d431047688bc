"""A diffusion model in Python: what its calls leave as it was, what follows from a change, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

import ldm_dkdm as dkdm
from ldm_dkdm.config.schema import NetworkConfig
from ldm_dkdm.networks import NETWORKS, DiT
from tests.cli import distil, run_script, sample, write_yaml
from tests.parts import distill_config

SCHEDULE = dkdm.NoiseSchedule("cosine", 20)
SMALL = {"images": 0, "chains": 2, "steps": 2}


class Dropping(nn.Module):
    """A network with dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.outer(nn.functional.dropout(self.norm(self.inner(x)), 0.5, self.training))


def pixel(network: nn.Module | None = None, **arguments: object) -> dkdm.DiffusionModel:
    """A model on 8x8 images."""
    given = {"schedule": SCHEDULE, "space": "pixel", "shape": (3, 8, 8), **arguments}
    return dkdm.DiffusionModel(network or Dropping(), **given)


def dit() -> dkdm.DiffusionModel:
    """A class-conditional transformer that drops labels while it trains."""
    params = {"hidden_size": 32, "depth": 1, "num_heads": 2, "learn_sigma": False}
    return pixel(DiT(8, in_channels=3, num_classes=4, class_dropout_prob=0.5, **params))


# Modes


@pytest.mark.parametrize("make", [pixel, dit])
def test_figures_come_from_eval_mode_and_the_modes_stay(make: Callable[[], dkdm.DiffusionModel]) -> None:
    student, teacher = make(), make()
    student.network.train()
    next(student.network.children()).eval()  # one frozen part
    modes = [module.training for module in student.network.modules()]
    state = {name: value.clone() for name, value in student.network.state_dict().items()}
    generator = torch.get_rng_state()
    first, second = (dkdm.evaluate(student, teacher, **SMALL) for _ in range(2))
    with pytest.raises(dkdm.UserError):
        student.check()
    assert first == second and torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in student.network.modules()]
    assert all(torch.equal(value, state[name]) for name, value in student.network.state_dict().items())
    assert first["eps_mse_by_t"] == dkdm.evaluate(frozen(student), teacher, **SMALL)["eps_mse_by_t"]


def frozen(model: dkdm.DiffusionModel) -> dkdm.DiffusionModel:
    model.network.eval()
    return model


# Weights that can be trained

FEW = {"steps": 1, "batch_size": 2, "progress": False, "sample_every": 9, "sample_count": 1, "sample_steps": 2}
DISTILLED = {**FEW, "rho": 0.2, "warmup": "noise", "check": False, "evaluate_every": 0}


def moved(model: dkdm.DiffusionModel, call: Callable[[], object]) -> set[str]:
    """Names of the weights that a call changes."""
    before = {name: weight.detach().clone() for name, weight in model.network.named_parameters()}
    call()
    return {name for name, weight in model.network.named_parameters() if not torch.equal(weight, before[name])}


def test_an_earlier_teacher_is_trained_and_a_part_that_is_frozen_stays_so(tmp_path: Path) -> None:
    first, second, third = pixel(), dit(), dit().frozen()
    second.network.x_embedder.requires_grad_(False)
    part = {name for name, weight in second.network.named_parameters() if not weight.requires_grad}
    teacher = dit().frozen()
    nn.init.normal_(teacher.network.final_layer.linear.weight)

    def distil(teacher: dkdm.DiffusionModel, student: dkdm.DiffusionModel, out: str) -> set[str]:
        return moved(student, lambda: dkdm.distill(teacher, student, tmp_path / out, **DISTILLED))

    found = distil(teacher, second, "a")
    assert found and not found & part  # also the positions, which are never trained
    assert distil(second, first, "b")  # its second use is as a teacher
    assert part == {name for name, weight in second.network.named_parameters() if not weight.requires_grad}
    assert "pos_embed" not in (found := distil(teacher, third, "c")) and found
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    model = pixel().frozen()
    assert moved(model, lambda: dkdm.train(model, tmp_path / "images", tmp_path / "d", **FEW))


class Fixed(nn.Module):
    """A network without weights."""

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return x


def test_a_network_that_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    teacher = pixel()
    with torch.inference_mode():
        inference = pixel()
    wrapped = pixel(nn.Sequential(teacher.network))
    wrapped.network.forward = lambda x, t, label=None: teacher.network(x, t, label)
    for student, words in (
        (pixel(Fixed()), "student: its network has no weights to train"),
        (inference, r"student: its weights were made within torch.inference_mode\(\)"),
        (wrapped, "student: its weights are the teacher's; make a new network"),
    ):
        with pytest.raises(dkdm.UserError, match=words):
            dkdm.distill(teacher, student, tmp_path / "run", **DISTILLED)
    assert not (tmp_path / "run").exists()
    assert all(weight.requires_grad for weight in teacher.network.parameters())


# Comparable models


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"schedule": dkdm.NoiseSchedule("cosine", 40)}, ("noise schedule", "T = 40", "T = 20")),
        ({"schedule": dkdm.NoiseSchedule("linear", 20)}, ("noise schedule", "linear", "cosine")),
        ({"space": "latent"}, ("space", "latent", "pixel")),
        ({"shape": (3, 4, 4)}, ("shape", "(3, 4, 4)", "(3, 8, 8)")),
        ({"num_classes": 4}, ("labels", "4 classes", "none")),  # a student without labels may have any teacher
    ],
)
def test_a_student_of_another_process_is_not_measured(student: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(dkdm.UserError, match=r"^student: .* differs from the teacher's") as refusal:
        dkdm.evaluate(pixel(**student), pixel(), **SMALL)
    assert all(word in str(refusal.value) for word in words)


def test_the_same_process_under_another_name_is_measured() -> None:
    betas = dkdm.NoiseSchedule(betas=SCHEDULE.betas.float())
    assert dkdm.evaluate(pixel(schedule=betas), pixel(), **SMALL)["agreement_q1"] > 0


# Changes


def test_a_change_of_the_schedule_changes_the_process() -> None:
    model = pixel()
    for change in ({"schedule": dkdm.NoiseSchedule("linear", 10)}, {"space": "latent"}):
        assert model.changed(**change).diffusion == pixel(**change).diffusion
    other = model.changed(schedule=dkdm.NoiseSchedule("linear", 10))
    assert other.schedule.num_timesteps == 10 and other.network is model.network
    with pytest.raises(dkdm.UserError, match=r"^diffusion: already says schedule"):
        model.changed(schedule=SCHEDULE, diffusion=model.diffusion)


def test_a_codec_is_kept_only_for_the_same_states(teacher_folder: Path, first_stage: Path) -> None:
    model = dkdm.load_model(teacher_folder)
    codec = model.codec()
    assert model.changed(precision="bf16").codec() is codec
    assert dkdm.DiffusionModel(Dropping(), like=model).codec() is codec
    pixels = model.changed(diffusion=pixel().diffusion)
    assert pixels.first_stage is None and pixels.sample(1, steps=2).shape == (1, 8, 8, 3)
    assert dkdm.DiffusionModel(Dropping(), like=model, space="pixel").sample(1, steps=2).shape == (1, 8, 8, 3)
    assert model.changed(first_stage=str(first_stage)).codec() is not codec
    with pytest.raises(dkdm.UserError, match="absent"):
        model.changed(first_stage="absent").codec()
    larger = dkdm.DiffusionModel(Dropping(), like=model, shape=(3, 16, 16))
    with pytest.raises(dkdm.UserError, match="latents of side 8, the model has 16"):
        larger.codec()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": "abc"}, "shape: expected a list, every entry a whole number, got 'abc'"),
        ({"shape": (3, 0, 8)}, r"shape: expected \(C,H,W\), each at least 1"),
        ({"num_classes": -3}, "num_classes: must be at least 1, got -3"),
        ({"null_label": -2}, "null_label: must be at least 0, got -2"),
        ({"null_label": 2}, "null_label: 2 is outside"),
        ({"guidance": "a"}, "guidance: expected a number, got 'a'"),
        ({"guidance": float("nan")}, "guidance: must be a finite number"),
        ({"space": "pixels"}, "space: 'pixels'"),
        ({"parameterization": "x"}, "parameterization: 'x'"),
        ({"first_stage": 3}, "first_stage: expected a path, got 3"),
        ({"space": "pixel", "first_stage": "vq"}, "first_stage: pixel space has none"),
    ],
)
def test_bad_values_are_refused_by_name_when_made_and_when_changed(change: dict[str, object], words: str) -> None:
    for make in (pixel, pixel().changed):
        with pytest.raises(dkdm.UserError, match=f"^{words}"):
            make(**change)


@pytest.mark.parametrize("change", [{"_codec": None}, {"path": "x"}, {"guidence": 2}, {"schedule": "linear"}])
def test_only_listed_attributes_change(change: dict[str, object]) -> None:
    with pytest.raises(dkdm.UserError, match=f"^{next(iter(change))}: ") as refusal:
        pixel().changed(**change)
    assert "_codec," not in str(refusal.value)


# Bad values


REFUSED: dict[str, Callable[[], object]] = {
    "num_timesteps: expected a whole number": lambda: dkdm.NoiseSchedule("linear", "100"),
    "num_timesteps: .* got 100.5": lambda: dkdm.NoiseSchedule("linear", 100.5),
    "beta_start: expected a number": lambda: dkdm.NoiseSchedule("linear", 100, "small"),
    "betas: expected a row of numbers": lambda: dkdm.NoiseSchedule(betas=["a"]),
    "labels: expected a list": lambda: pixel(num_classes=4).sample(1, labels=3),
    "device: 'nix' cannot be used here": lambda: pixel().to("nix"),
    "images: expected a whole number": lambda: dkdm.evaluate(pixel(), pixel(), images="a"),
    "seed: must be at least 0, got -1": lambda: dkdm.evaluate(pixel(), pixel(), seed=-1),
    "batch_size: must be at least 1": lambda: dkdm.evaluate(pixel(), pixel(), batch_size=0),
    "use_ema: expected true or false": lambda: dkdm.load_model("absent", use_ema="nein"),
    "null_label: must be at least 0": lambda: dkdm.load_model("absent", null_label=-1),
    "parameterization: 'x'": lambda: dkdm.load_model("absent", parameterization="x"),
    "params: expected a section": lambda: dkdm.load_model("absent", params="abc"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_values_are_refused_by_the_parameters_name(words: str) -> None:
    with pytest.raises(dkdm.UserError, match=f"^{words}") as refusal:
        REFUSED[words]()
    assert "\n" not in str(refusal.value)


# Messages name the file at fault


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("network.params.image_sz", 3, "image_sz"),
        ("null_label", 5, "null_label: 5 is outside"),
        ("shape", [3, 4, 4], "shape: the network takes states"),
        ("diffusion.beta_start", 0.9, "beta_start, beta_end: must satisfy"),
    ],
)
def test_a_mistake_in_a_card_names_its_folder(
    key: str, value: object, words: str, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(teacher_folder, folder)
    card = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(card, key, value, force_add=True)
    OmegaConf.save(card, folder / "config.yaml")
    with pytest.raises(dkdm.UserError, match=words) as refusal:
        dkdm.load_model(folder)
    assert str(refusal.value).startswith(str(folder))
    config = distill_config(folder, tmp_path)
    assert distil("--base", write_yaml(tmp_path / "base.yaml", config)) == 2
    error = capsys.readouterr().err
    assert f"teacher.ckpt: {folder}" in error and words in error, error


def test_of_several_models_the_one_at_fault_is_named(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dit().save(tmp_path / "dit")
    for models, flag in (((folder, teacher_folder), ("--labels", 1)), ((folder, teacher_folder), ("--guidance", 2))):
        assert sample("-r", *models, *flag, "-n", 1, "-l", tmp_path / "out") == 2
        assert f"{flag[0]}: {teacher_folder}: " in capsys.readouterr().err


def test_advice_on_first_stages_names_first_stages_and_the_hint(teacher_folder: Path, tmp_path: Path) -> None:
    model = dkdm.load_model(teacher_folder, first_stage=tmp_path / "nix")
    with pytest.raises(dkdm.UserError, match="nix is missing; name a first-stage folder"):
        model.codec()
    model.save(tmp_path / "unet.pt", "adm")
    with pytest.raises(dkdm.UserError, match=r"holds no first stage; .*first_stage=PATH"):
        dkdm.load_model(teacher_folder, first_stage=tmp_path / "unet.pt").codec()
    dkdm.load_model(teacher_folder).save(tmp_path / "model.ckpt", "compvis")
    with pytest.raises(dkdm.UserError, match=r"was trained with T = 20.*the given values mean T = 10") as refusal:
        dkdm.load_model(tmp_path / "model.ckpt", image_size=8, num_head_channels=32, num_timesteps=10)
    assert "configuration" not in str(refusal.value)


def test_a_plugins_network_is_inspected_without_our_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plainnet.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.c = nn.Conv2d(3, 3, 1)\n"
    )
    monkeypatch.setattr("ldm_dkdm.networks.NETWORKS", known := dict(NETWORKS))
    node = NetworkConfig("plainnet.Net", {}, "eps")
    pixel(nn.Conv2d(3, 3, 1)).changed(node=node).save(tmp_path / "plain")
    assert run_script("inspect_checkpoint.py", tmp_path / "plain", "--plugin", tmp_path / "plainnet.py") == 0
    assert "plainnet.Net, 0.000012 M parameters" in capsys.readouterr().out and "plainnet.Net" in known
