"""Options and configs of other codes get a line with ours."""

from pathlib import Path

import pytest

from ldm_dkdm.commands.main import parser_of
from ldm_dkdm.commands.other_flags import OTHER_FLAGS
from ldm_dkdm.config.load import load_config
from ldm_dkdm.errors import UserError
from tests.cli import distil, sample, write_yaml


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


def test_b_is_base() -> None:
    assert parser_of("distill").parse_args(["-b", "quickstart", "trainer.max_steps=1"]).base == [
        "quickstart",
        "trainer.max_steps=1",
    ]


def test_other_mistakes_keep_their_line() -> None:
    for command in ("distill", "train", "train-first-stage"):
        with pytest.raises(UserError, match="unrecognized arguments: --nonsense"):
            parser_of(command).parse_args(["--nonsense"])


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
