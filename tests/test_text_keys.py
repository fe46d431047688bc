"""Text keys keep what was typed; paths begin at home; a long override is not a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm_dkdm.commands.arguments import read_hints, split_base
from ldm_dkdm.commands.hints import split_paths
from ldm_dkdm.config.load import load_config, read_yaml, to_yaml
from ldm_dkdm.config.schema import DiffusionRun, DistillConfig, DistillRun, LoggingConfig
from ldm_dkdm.config.text import plain_values, quoted, written
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import expanded
from ldm_dkdm.networks.scaling import parse_budget
from ldm_dkdm.training.run_folder import RunFolder, require_plain, run_folder
from tests.cli import run_script

NAMES = [
    "1.1",
    "1.10",
    "007",
    "12:30",
    "1:20:30",
    "on",
    "No",
    "yes",
    "true",
    "1e5",
    "0x10",
    "0o17",
    "1_000",
    ".5",
    "-1",
]
NAMES += ["20240501_1200", "2024-05-01", ".inf", ".nan", "+1", "1.", "=", "<<"]
BASE = """
teacher: {ckpt: x.ckpt}
student: {target: ldm_dkdm.networks.UNet}
distill: {batch_size: 4, rho: 0.05}
trainer: {max_steps: 4, learning_rate: 1e-3}
"""


def config(tmp_path: Path, text: str = "", *overrides: str) -> DistillRun:
    file = tmp_path / "config.yaml"
    file.write_text(BASE + text)
    return load_config(file, overrides)


def test_a_text_is_found_behind_characters_of_many_bytes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(f"\ufeff# \N{GRINNING FACE} \u2028\r\n{BASE}logging: {{dir: ä, name: 1.10}} # ö\r\n".encode())
    assert load_config(file).logging.name == "1.10"


def test_what_is_done_to_a_config_changes_no_later_reading(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(BASE)
    read_yaml(file).teacher.ckpt = "other.ckpt"
    assert read_yaml(file).teacher.ckpt == "x.ckpt"


def test_a_merge_changes_no_later_reading(tmp_path: Path) -> None:
    file, second = tmp_path / "config.yaml", tmp_path / "second.yaml"
    file.write_text(BASE.replace("{ckpt: x.ckpt}", "{ckpt: x.ckpt, target: UNet, params: {model_channels: 32}}"))
    second.write_text("student: {target: ldm_dkdm.networks.DiT, unet_config: {params: {depth: 2}}}\n")
    alone, described = load_config(file), Path("models/teachers/emoji64").resolve()
    both = load_config([file, second], ["teacher.ckpt=x.ckpt", f"teacher.ckpt={described}"])
    assert (both.student.params, both.teacher.target, both.teacher.params) == ({"depth": 2}, None, {})
    assert load_config(file, [f"teacher.ckpt={described}"]).teacher.params == {}
    assert load_config(file) == alone
    assert (alone.teacher.target, alone.teacher.params) == ("UNet", {"model_channels": 32})


def test_every_text_is_written_so_that_it_is_read_again(tmp_path: Path) -> None:
    odd = ["", "null", "~", "y", "1e-3", "a: b", "x # y", "*a", "&a", "?", "a\nb", "\N{GRINNING FACE}", "\x7f", "${a}"]
    listed = ("2", 2, 1e-05, None, True)
    tree = {text: [text, {"twice": listed, "again": listed}] for text in (*NAMES, *odd)}
    assert OmegaConf.to_container(OmegaConf.create(written(tree))) == plain_values(tree)
    assert written(tree) == OmegaConf.to_yaml(OmegaConf.create(tree))


def test_a_value_that_no_file_holds_is_named_by_its_key() -> None:
    config = DistillConfig(4, rho=1)
    assert plain_values({"a": [np.float64(0.5), Path("a").name, config]})["a"][:2] == [0.5, "a"]
    for value in (np.int64(3), torch.zeros(1), {1, 2}, Path("a")):
        with pytest.raises(UserError, match=r"^student\.params\[1\]\.k: a config holds plain numbers"):
            to_yaml({"student": {"params": [1, {"k": value}]}})


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_text_that_was_typed(tmp_path: Path, name: str) -> None:
    in_file = config(tmp_path, f"logging:\n  name: {name}\n") if name not in ("=", "<<") else None
    in_override = config(tmp_path, "", f"logging.name={name}")
    in_section = config(tmp_path, "", f"logging={{name: {name}}}") if name not in ("=", "<<") else None
    assert {c.logging.name for c in (in_file, in_override, in_section) if c} == {name}
    stored = tmp_path / "stored.yaml"
    stored.write_text(to_yaml(in_override))
    assert load_config(stored) == in_override


@pytest.mark.parametrize(
    "value",
    [
        "run #1",
        "a: b",
        "[x",
        "{x",
        "*x",
        "&x y",
        "!x",
        "%x",
        "@x",
        "`x`",
        "a=b",
        "x\\ny",
        "- x",
        "#42-fix",
        "&a",
        "---",
    ],
)
def test_an_override_of_a_text_key_is_not_yaml(tmp_path: Path, value: str) -> None:
    assert config(tmp_path, "", f"logging.name={value}").logging.name == value


def test_quotes_and_null_keep_their_meaning(tmp_path: Path) -> None:
    for value in ("null # x", "'a' # x", "&x 'a'", "!!str x"):
        assert config(tmp_path, "", f"logging.name={value}").logging.name == value
    for given, name in (("'007'", "007"), ('"on"', "on"), ("null", None), ("~", None), ("", None), ('"null"', "null")):
        assert config(tmp_path, "", f"logging.name={given}").logging.name == name
        assert config(tmp_path, f"logging: {{name: {given}}}\n").logging.name == name
    assert config(tmp_path, "logging: {name: null}\n").logging.name is None
    with pytest.raises(UserError, match=r"logging\.dir: expected text, got None"):
        config(tmp_path, "", "logging.dir=null")


def test_anchors_comments_and_merges_keep_the_text(tmp_path: Path) -> None:
    text = "logging: &log\n  name: &n 1.10  # the tenth\n  dir: *n\n"
    assert config(tmp_path, text).logging == LoggingConfig(dir="1.10", name="1.10")
    both = "logging: {name: *n, dir: &d 1e-3}\ndistill: {batch_size: 4, rho: *d}\n"
    file = tmp_path / "shared.yaml"
    file.write_text(BASE.partition("distill")[0] + "trainer: {max_steps: 4, learning_rate: &n 1.10}\n" + both)
    found = load_config(file)
    assert found.logging == LoggingConfig(dir="1e-3", name="1.10")
    assert (found.trainer.learning_rate, found.distill.rho) == (1.1, 0.001)
    tree = yaml.safe_load(quoted("a: &a {name: 007}\nb: {<<: *a, dir: on}\n", {"a": LoggingConfig, "b": LoggingConfig}))
    assert tree == {"a": {"name": "007"}, "b": {"name": "007", "dir": "on"}}
    assert quoted("name: 007\nn: 007\n", {"name": str}) == 'name: "007"\nn: 007\n'


def test_a_bad_reference_is_blamed_on_the_file_that_holds_it(tmp_path: Path) -> None:
    config(tmp_path)
    for name, text in (("a.yaml", "logging: {name: '${teacher.nothing}'}"), ("b.yaml", "trainer: {max_steps: 5}")):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"/a\.yaml: logging\.name: \$\{teacher\.nothing\} names a key that no file"):
        load_config([tmp_path / name for name in ("config.yaml", "a.yaml", "b.yaml")])


def test_numbers_and_flags_of_other_keys_stay(tmp_path: Path) -> None:
    found = config(tmp_path, "", "trainer.max_steps=1_000", "teacher.check=off", "trainer.precision=32")
    assert (found.trainer.max_steps, found.teacher.check, found.trainer.precision) == (1000, False, "32")
    assert config(tmp_path, "", "teacher.params={a: 1.10, b: on}").teacher.params == {"a": 1.1, "b": True}


@pytest.mark.parametrize("listed", ["[1.10, 1e5, 007, no, 1_000, 12:30, ~]", "[1.10,1e5,'007',no,1_000,12:30,~]"])
def test_the_texts_of_a_list_are_as_typed(tmp_path: Path, listed: str) -> None:
    """Names of classes, which are names of folders."""
    run = f"model: {{target: x, params: {{}}}}\ndiffusion: {{}}\n{BASE[BASE.index('trainer') :]}"
    data = "{path: d, image_size: 8, batch_size: 1"
    file = tmp_path / "config.yaml"
    file.write_text(f"{run}data: {data}, classes: {listed}}}\n")
    found = [load_config(file, schema=DiffusionRun)]
    file.write_text(f"{run}data: {data}}}\n")
    found.append(load_config(file, [f"data.classes={listed}"], DiffusionRun))
    file.write_text(to_yaml(found[0]))
    found.append(load_config(file, schema=DiffusionRun))
    assert {own.data.classes for own in found} == {("1.10", "1e5", "007", "no", "1_000", "12:30", "~")}


@pytest.mark.parametrize(
    ("text", "budget"), [("60M", 60_000_000), ("1e6", 10**6), ("1_000", 1000), ("2.5e+5", 250_000)]
)
def test_a_budget_keeps_its_text_and_its_value(tmp_path: Path, text: str, budget: int) -> None:
    assert parse_budget(config(tmp_path, "", f"student.budget={text}").student.budget or "") == budget


def test_hints_keep_their_text() -> None:
    assert read_hints(["first_stage=007", "image_size=64", "schedule=cosine"]) == {
        "first_stage": "007",
        "image_size": 64,
        "schedule": "cosine",
    }
    assert read_hints(["first_stage=/a/run #2/b: c"]) == {"first_stage": "/a/run #2/b: c"}


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["teacher.ckpt=~/t", "student.init=~/s", "first_stage.ckpt=~/f", "distill.pool_from=~/p", "logging.dir=~"]
    found = config(tmp_path, "", *given)
    paths = [found.teacher.ckpt, found.student.init, found.first_stage.ckpt, found.distill.pool_from, found.logging.dir]
    assert paths == [f"{tmp_path}/t", f"{tmp_path}/s", f"{tmp_path}/f", f"{tmp_path}/p", f"{tmp_path}"]
    file = tmp_path / "data.yaml"
    file.write_text(
        "model: {target: x, params: {}, init: ~/m}\ndiffusion: {}\ntrainer: {max_steps: 1, learning_rate: 1}\n"
    )
    data = ["data={path: ~/d, synthetic: ~/e.npz, image_size: 8, batch_size: 1}"]
    run = load_config("~/data.yaml", data, DiffusionRun)
    assert (run.data.path, run.data.synthetic, run.model.init) == (
        f"{tmp_path}/d",
        f"{tmp_path}/e.npz",
        f"{tmp_path}/m",
    )
    assert expanded("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$HOME/runs", "variables of a shell"),
        ("a/$USER/b", "variables of a shell"),
        ("~nobody-of-that-name/x", "does not exist"),
    ],
)
def test_what_only_a_shell_replaces_in_a_path_is_refused(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of")
    for key in ("logging.dir", "teacher.ckpt"):
        with pytest.raises(UserError, match=rf"{key}: .*{words}.*oc\.env:HOME"):
            config(tmp_path, "", f"{key}={path}")
    assert config(tmp_path, "", "logging.dir=${oc.env:HOME}/runs").logging.dir == "/home/of/runs"
    (tmp_path / path).mkdir(parents=True)
    assert config(tmp_path, "", f"logging.dir={path}").logging.dir == path


def test_a_run_folder_that_lightning_reads_otherwise_is_refused() -> None:
    for path in ("logs/a::b", "data:x/run"):
        with pytest.raises(UserError, match=r"logging: .*change logging\.dir or logging\.name"):
            require_plain(RunFolder(Path(path)).path)
    with pytest.raises(UserError, match=r"logging\.name: '~/x' must be a folder below"):
        run_folder(LoggingConfig(name="~/x"), "default", DistillRun)
    with pytest.raises(UserError, match=r"logging\.name: 'a/ééé.*' is longer than the 255 bytes"):
        run_folder(LoggingConfig(name="a/" + "é" * 128), "default", DistillRun)
    run_folder(LoggingConfig(name="é" * 127), "default", DistillRun)


def test_an_override_longer_than_a_file_name_is_an_override(tmp_path: Path) -> None:
    long = "teacher.params={" + ", ".join(f"key_{i}: {i}" for i in range(60)) + "}"
    file = tmp_path / "a=b.yaml"
    file.write_text(BASE)
    assert len(long) > 255
    assert split_base([str(file), long], []) == ([str(file)], [long])
    assert split_paths([str(tmp_path), long]) == ([str(tmp_path)], [long])
    with pytest.raises(UserError, match="no such config file or recipe"):
        split_base(["x" * 300], [])


def test_a_missing_file_with_an_equals_sign_is_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ["logs/a/checkpoints/step=00000004.ckpt", "step=00000004.ckpt", "a=b/images.npz"]
    hints = ["first_stage=vq/model.ckpt", "1.first_stage=vq/model.ckpt", "params={a: b/c}", "num_heads=4"]
    assert split_paths([*gone, *hints]) == (gone, hints)
    kept = tmp_path / "checkpoints"
    kept.mkdir()
    (kept / "step=00000002.ckpt").write_bytes(b"")
    for command in (["txt-free_sample.py", "-n", "1", "-r"], ["inspect_checkpoint.py"]):
        assert run_script(*command, kept / "step=00000004.ckpt") == 2
        error = capsys.readouterr().err
        assert f"no such checkpoint file; {kept} holds step=00000002.ckpt; name one of them, or {tmp_path}" in error
