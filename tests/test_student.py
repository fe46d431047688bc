"""Which student a configuration means, and what it begins with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_dkdm import DiffusionModel, NoiseSchedule, UserError, load_model
from ldm_dkdm.checkpoints.as_built import other_constant
from ldm_dkdm.config.schema import NetworkConfig
from ldm_dkdm.distillation.make_student import require_fit
from ldm_dkdm.networks import DiT, UNet
from tests.cli import distil, write_yaml
from tests.parts import UNET_PARAMS, distill_config, model_folder

STILL = {"learning_rate": 1e-12, "max_steps": 3}


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory, first_stage: Path) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "wide", first_stage, model_channels=64)


def distilled(teacher: Path, home: Path, student: dict[str, object], **trainer: object) -> Path:
    config = distill_config(teacher, home, trainer=trainer)
    config["student"] = student
    assert distil("--base", write_yaml(home / "base.yaml", config)) == 0
    return home / "run" / "student"


def test_a_budget_narrows_the_teachers_unet_and_says_so(
    wide_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = distilled(wide_teacher, tmp_path, {"budget": "1M", "parameterization": "v"})
    shown = capsys.readouterr().out
    assert "student.budget 1M: model_channels 32" in shown
    assert shown.count("student.params.norm_groups: with 32 some channels are normalised one by one") == 1
    model = load_model(student)
    assert model.node.params == {**UNET_PARAMS, "model_channels": 32}
    assert model.parameterization == "v"
    assert sum(p.numel() for p in model.network.parameters()) <= 1_000_000


def test_channels_in_groups_of_two_are_not_named(
    wide_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = {"target": "ldm_dkdm.networks.UNet", "params": {**UNET_PARAMS, "norm_groups": 16}}
    distilled(wide_teacher, tmp_path, node, max_steps=1)
    assert "norm_groups" not in capsys.readouterr().out


def test_init_teacher_begins_with_the_teachers_tensors(
    wide_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {**UNET_PARAMS, "model_channels": 64}
    node = {"target": "ldm_dkdm.networks.UNet", "params": same, "init": "teacher"}
    found = load_file(distilled(wide_teacher, tmp_path, node, **STILL) / "student.safetensors")
    expected = load_file(wide_teacher / "model.safetensors")
    assert f"student.init: 0 tensors sliced, {len(expected)} copied, 0 left random" in capsys.readouterr().out
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)


def test_init_of_a_folder_begins_with_its_weights(teacher_folder: Path, tmp_path: Path) -> None:
    node = {"target": "ldm_dkdm.networks.UNet", "params": UNET_PARAMS, "init": str(teacher_folder)}
    found = load_file(distilled(teacher_folder, tmp_path, node, **STILL) / "student.safetensors")
    for name, tensor in load_file(teacher_folder / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def test_a_budget_takes_other_groups_for_the_norms(
    wide_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = distilled(wide_teacher, tmp_path, {"budget": "1M", "params": {"norm_groups": 16}}, max_steps=1)
    assert "norm_groups" not in capsys.readouterr().out
    model, own = load_model(student), load_model(wide_teacher).narrowed("1M", norm_groups=16)
    assert model.node == own.node and own.node.params == {**UNET_PARAMS, "model_channels": 32, "norm_groups": 16}
    teacher = load_model(wide_teacher)
    for groups, words in (
        (0, "at least 1"),
        (1.5, "expected a whole"),
        ("16", "expected a whole"),
        (128, "128 groups fit"),
    ):
        with pytest.raises(UserError, match=f"^norm_groups: .*{words}"):
            teacher.narrowed("1M", norm_groups=groups)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("norm_groups", 16, "input_blocks.1.0.in_layers.0: num_groups 32 there, 16 here"),
        ("num_head_channels", 64, "heads 2 there, 1 here"),
        ("dropout", 0.1, ""),
    ],
)
def test_init_of_a_folder_names_a_network_that_computes_otherwise(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: float, there: str
) -> None:
    params = {**UNET_PARAMS, key: value}
    node = {"target": "ldm_dkdm.networks.UNet", "params": params, "init": str(teacher_folder)}
    distilled(teacher_folder, tmp_path, node, max_steps=1)
    shown = capsys.readouterr()
    assert ("has weights of another network" in shown.out + shown.err) is bool(there)
    assert there in shown.out + shown.err


def test_init_of_a_folder_that_predicts_something_else_is_refused(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distill_config(teacher_folder, tmp_path, student={"init": str(teacher_folder)})  # eps; the student: v
    assert distil("--base", write_yaml(tmp_path / "base.yaml", config)) == 2
    assert "student.init" in (error := capsys.readouterr().err) and "predicts eps" in error


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"budget": "1k"}, ("student.budget", "too small")),
        ({"budget": "much"}, ("student.budget", "60M")),
        ({"budget": "1M", "target": "ldm_dkdm.networks.UNet"}, ("student.budget", "remove")),
        ({"budget": "1M", "params": {"model_channels": 32}}, ("student.budget", "but for params.norm_groups")),
        ({"budget": "1M", "params": {"norm_groups": 0}}, ("student.params.norm_groups", "at least 1")),
        ({}, ("student.target: missing", "student.budget")),
        (
            {
                "target": "ldm_dkdm.networks.DiT",
                "params": {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2},
            },
            ("out_channels", "learn_sigma: false"),
        ),
        (
            {
                "target": "ldm_dkdm.networks.DiT",
                "params": {
                    "input_size": 8,
                    "in_channels": 3,
                    "hidden_size": 32,
                    "depth": 1,
                    "num_heads": 2,
                    "learn_sigma": False,
                },
                "init": "teacher",
            },
            ("student.init", "DiT and UNet"),
        ),
    ],
)
def test_students_that_cannot_be_are_refused_in_one_line(
    student: dict[str, object], words: tuple[str, ...], wide_teacher: Path, tmp_path: Path, capsys
) -> None:
    config = distill_config(wide_teacher, tmp_path)
    config["student"] = student
    assert distil("--base", write_yaml(tmp_path / "base.yaml", config)) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and all(word in error for word in words), error


def test_a_student_has_the_classes_of_its_teacher() -> None:
    network = UNet(**UNET_PARAMS, num_classes=4)
    teacher = DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=20), space="pixel", null_label=3)
    sizes = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2, "learn_sigma": False}
    for classes in (3, None):
        require_fit(DiffusionModel(DiT(**sizes, num_classes=classes), like=teacher), teacher)
    require_fit(teacher.student(teacher.node), teacher)
    for count in (4, 5):
        words = rf"num_classes: {count} makes other classes than the teacher's 3 \(null_label 3\); set it to 3$"
        with pytest.raises(UserError, match=words):
            require_fit(DiffusionModel(DiT(**sizes, num_classes=count), like=teacher), teacher)
    first = DiffusionModel(network, schedule=NoiseSchedule(num_timesteps=20), space="pixel", null_label=0)
    with pytest.raises(UserError, match=r"set 4 and class_dropout_prob: 0, or train a UNet$"):
        require_fit(DiffusionModel(DiT(**sizes, num_classes=3), like=first), first)
    require_fit(DiffusionModel(DiT(**sizes, num_classes=4, class_dropout_prob=0.0), like=first), first)
    require_fit(DiffusionModel(DiT(**sizes, num_classes=4), like=teacher), teacher, begun=True)  # of an older version


def test_what_changes_no_prediction_is_no_other_network() -> None:
    unet, label = NetworkConfig("ldm_dkdm.networks.UNet", UNET_PARAMS), {"num_classes": 4, "learn_sigma": False}
    assert other_constant(UNet(**{**UNET_PARAMS, "image_size": 64}), unet) == ""
    assert "num_groups 32 there, 16 here" in other_constant(
        UNet(**UNET_PARAMS | {"image_size": 64, "norm_groups": 16}), unet
    )
    params = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2, **label}
    dit = NetworkConfig("ldm_dkdm.networks.DiT", params)
    assert other_constant(DiT(**params, class_dropout_prob=0.3), dit) == ""
    assert other_constant(DiT(**params | {"num_heads": 3}), dit) == "blocks.0.attn: heads 2 there, 3 here"
