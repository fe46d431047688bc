"""Options and configs of other codes get a line with ours."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ldm_dkdm import load_model
from ldm_dkdm.checkpoints import Hints
from ldm_dkdm.commands.distill import open_teacher
from ldm_dkdm.commands.hints import ScopedHints
from ldm_dkdm.commands.main import parser_of
from ldm_dkdm.commands.other_flags import OTHER_FLAGS
from ldm_dkdm.config.load import load_config
from ldm_dkdm.config.registry import build
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, FirstStageRun
from ldm_dkdm.errors import UserError
from ldm_dkdm.networks import NETWORKS, UNet
from tests.cli import distil, sample, write_yaml
from tests.parts import UNET_PARAMS
from tests.test_foreign import PIXEL, run_with


@pytest.mark.parametrize("flag", OTHER_FLAGS)
def test_every_option_of_another_code_gets_one_line(flag: str) -> None:
    for command in ("distill", "train", "sample"):
        parser = parser_of(command)
        if flag in parser._option_string_actions:
            continue
        for words in ([flag, "1"], [f"{flag}=1"]):
            with pytest.raises(UserError, match=rf"^{flag}: is not an option here; ") as error:
                parser.parse_args(words)
            assert "\n" not in str(error.value)


def test_the_line_comes_before_missing_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--model_path", "x.pt", "--num_samples", 5) == 2
    assert capsys.readouterr().err == (
        "error: --model_path: is not an option here; write -r MODEL, or teacher.ckpt=MODEL for a distillation\n"
    )
    assert distil("-b", "quickstart", "-t", "--gpus", "0,", "--scale_lr", "False") == 2
    assert capsys.readouterr().err.startswith("error: -t: is not an option here; leave it out")


def test_a_key_that_not_every_run_has_is_named_with_its_run() -> None:
    assert OTHER_FLAGS["--data_dir"] == "write data.path=FOLDER for a training on images"
    assert OTHER_FLAGS["--stu_batch_size"] == "write distill.batch_size=N for a distillation"
    assert OTHER_FLAGS["--lr"] == "write trainer.learning_rate=X"


def test_b_is_base() -> None:
    assert parser_of("distill").parse_args(["-b", "quickstart", "trainer.max_steps=1"]).base == [
        "quickstart",
        "trainer.max_steps=1",
    ]


def test_other_mistakes_keep_their_line() -> None:
    for command in ("distill", "train", "train-first-stage"):
        with pytest.raises(UserError, match="unrecognized arguments: --nonsense"):
            parser_of(command).parse_args(["--nonsense"])


@pytest.mark.parametrize("words", [["--seed", "1", "2"], ["--seed=1", "2"], ["--seed", "2", "2"]])
def test_a_second_number_after_a_flag_is_no_model(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--seed: takes one value, got [12] and 2$"):
        parser_of("sample").parse_args(["-r", "model", "-n", "4", *words, "--npz"])
    given = ["-r", "model", "--labels", "1", "2", "--seed", "1"]
    assert parser_of("sample").parse_args(given).labels == [1, 2]


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"base_learning_rate": 1e-4, "target": "ldm.x"}, "data": {}, "lightning": {}},
        {"teacher": {"model": "a.yaml", "tempfile": "b.cache", "iter_choice": "x"}, "student": {}},
    ],
)
def test_a_config_of_another_code_is_named_as_a_whole(tree: dict[str, object], tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "theirs.yaml", tree)
    with pytest.raises(UserError, match=r"theirs\.yaml: made for another code's scripts; docs/coming-from-dkdm\.md"):
        load_config(file)


HINTS = {"image_size": 8, "num_head_channels": 32, "use_new_attention_order": False, "space": "pixel"}
ANSWERS = {
    "noise_schedule": ("cosine", "write schedule=NAME", "write diffusion.schedule=NAME"),
    "diffusion_steps": (4000, "write num_timesteps=N", "write diffusion.num_timesteps=N"),
    "predict_xstart": (True, "write parameterization=x0", "write teacher.parameterization=x0"),
    "class_cond": (True, "write num_classes=N", "write teacher.params.num_classes=N"),
    "num_channels": (32, "here it is model_channels, 32 by the tensors; leave it out", "model_channels, 32 by the ten"),
    "learn_sigma": (
        True,
        "here it is out_channels, 3 by the tensors; leave",
        "here it is out_channels, 3 by the tensors",
    ),
    "use_fp16": (True, "precision is --precision bf16, in a config trainer.precision", "precision is --precision bf16"),
    "parametrization": ("v", "did you mean 'parameterization'?", "did you mean 'teacher.parameterization'?"),
    "num_timestep": (10, "did you mean 'num_timesteps'?", "did you mean 'diffusion.num_timesteps'?"),
    "first_stag": ("x", "did you mean 'first_stage'?", "did you mean 'first_stage.ckpt'?"),
    "num_head_channel": (32, "did you mean 'num_head_channels'?", "did you mean 'num_head_channels'?"),
    "qqqq": (1, "valid keys: image_size, ", "valid keys: image_size, "),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hint_of_another_name_is_answered_by_ours(name: str, tmp_path: Path) -> None:
    torch.save(UNet(**UNET_PARAMS).state_dict(), tmp_path / "x.pt")
    value, flat, dotted = ANSWERS[name]
    for given in (HINTS, {}):
        with pytest.raises(UserError) as error:
            load_model(tmp_path / "x.pt", **given, **{name: value})
        assert f"x.pt: {name}: is not a hint; {flat}" in str(error.value)
    with pytest.raises(UserError) as error:
        open_teacher(run_with(tmp_path / "x.pt", PIXEL, params={name: value}))
    assert f"teacher.params.{name}: unknown parameter of" in str(error.value) and dotted in str(error.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("student.params.num_channels=32", "unknown key of UNet; here it is 'model_channels'"),
        ("student.params.noise_schedule=cosine", "unknown key of UNet; here it is diffusion.schedule"),
        ("diffusion.noise_schedule=cosine", "diffusion.noise_schedule: unknown key; here it is 'schedule'"),
        ("diffusion.diffusion_steps=9", "diffusion.diffusion_steps: unknown key; here it is 'num_timesteps'"),
    ],
)
def test_a_key_of_another_code_is_answered_by_ours(key: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert distil("-b", "quickstart", key, "--plan") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("trainer.ema_rate", "trainer.ema_decay"),
        ("distill.prob", "distill.discard"),
        ("iter_choice", "distill.variant"),
        ("distill.cache_path", "distill.pool_from"),
        ("teacher.teacher_ckp", "teacher.ckpt"),
        ("logging.every_n_train_steps", "logging.save_every"),
    ],
)
def test_a_key_of_the_public_code_is_answered_with_ours(key: str, ours: str, capsys) -> None:
    assert distil("--base", "quickstart", f"{key}=1") == 2
    assert f"{key}: unknown key; here it is {ours}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schema", "key"),
    [
        (DistillRun, "data_dir"),
        (DiffusionRun, "model_path"),
        (FirstStageRun, "stu_batch_size"),
        (FirstStageRun, "data.noise_schedule"),
    ],
)
def test_no_key_is_answered_with_a_section_that_the_run_lacks(schema: type, key: str, tmp_path: Path) -> None:
    sections = {field.name: {} for field in fields(schema)}
    file = write_yaml(tmp_path / "run.yaml", {name: node for name, node in sections.items() if name != "hue"})
    with pytest.raises(UserError, match=rf"^{key}: unknown key; (?!here it is)"):
        load_config(file, f"{key}=1", schema)


def test_a_parameter_of_a_network_is_not_answered_with_a_training_key() -> None:
    with pytest.raises(UserError, match=r"params\.prob: unknown key of UNet; (?!here it is)"):
        build({"target": "ldm_dkdm.networks.UNet", "params": {**UNET_PARAMS, "prob": 1}}, NETWORKS)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("first_stage.ckpt=a/b", "first_stage=a/b"),
        ("teacher.params.image_size=8", "image_size=8"),
        ("diffusion.schedule=cosine", "schedule=cosine"),
        ("first_stage.scale_factor=2", "scale_factor=2"),
    ],
)
def test_hints_may_be_written_as_in_a_config(written: str, read: str) -> None:
    assert ScopedHints([written], ["1"]).bare == ScopedHints([read], ["1"]).bare
    assert ScopedHints(["image_size=8"], ["1"]).bare == {"image_size": 8}


def test_a_hint_for_a_model_that_is_not_named_is_refused() -> None:
    with pytest.raises(UserError, match=r"2\.image_size=8: no model has the number 2, -r names 1"):
        ScopedHints(["2.image_size=8"], ["1"])
    assert Hints.of(channel_mult="(1, 2)").spelled_as({"channel_mult": [1, 2]}).params["channel_mult"] == [1, 2]


@pytest.mark.parametrize("text", ["(a, b)", "(1, x)", "()", "1,x"])
def test_a_hint_that_is_not_a_list_stays_as_typed(text: str) -> None:
    assert Hints.of(channel_mult=text).spelled_as({"channel_mult": [1, 2]}).params["channel_mult"] == text
