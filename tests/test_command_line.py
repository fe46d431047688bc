"""The `dkdm` command: help and mistakes without torch, and networks of the user's own by --plugin."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ldm_dkdm as dkdm
from ldm_dkdm.commands import demo, distill
from ldm_dkdm.commands.arguments import how_to_go_on
from ldm_dkdm.commands.main import COMMANDS, main, parser_of
from ldm_dkdm.config.load import load_config
from ldm_dkdm.errors import Stopped
from ldm_dkdm.networks import NETWORKS
from tests.cli import ROOT, contents, distil, run_script, sample, write_yaml
from tests.parts import distill_config
from tests.test_config_errors import assert_one_error_line

RUN_ALL = """
import contextlib, io, json, sys
from ldm_dkdm.commands.main import main

found = []
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(None, arguments)
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "lightning", "numpy", "PIL", "safetensors"} & set(sys.modules))
    found.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(found))
"""
HELPED = [[], ["-h"], ["--help"], ["--version"], ["distill", "--version"], *([name, "--help"] for name in COMMANDS)]
LISTED = [["distill", "--keys"], ["distill", "--keys", "trainer"], ["train", "--keys", "data"]]
REFUSED = {
    "'distil' is not a command; did you mean 'distill'?": ["distil"],
    "--base: name at least one config file or recipe": ["distill"],
    "--max_steps: is not an option here; write trainer.max_steps=N": ["distill", "--base", "quickstart", "--max_steps"],
    "trainer.max_steps: must be at least 1, got 0": ["distill", "--base", "quickstart", "trainer.max_steps=0"],
    "student.zzz: unknown key": ["distill", "--base", "quickstart", "student.zzz=1"],
    "quickstrt: no such config file or recipe; did you mean 'quickstart'?": ["distill", "--base", "quickstrt"],
    "--keys: 'trainr' is not a section; did you mean 'trainer'?": ["distill", "--keys", "trainr"],
    "--resume: nowhere is not a run folder": ["train", "--resume", "nowhere"],
    "made for dkdm distill, not for dkdm train-first-stage": ["train-first-stage", "--base", "quickstart"],
    "the following arguments are required: -r/--resume": ["sample"],
    "--n_samples: must be at least 1, got 0": ["sample", "-r", "nowhere", "-n", "0"],
    "argument --sampler: invalid choice: 'dance'": ["sample", "-r", "nowhere", "--sampler", "dance"],
    "--n_samples: at least 65": ["evaluate", "-r", "nowhere", "-n", "3"],
    "argument --to: invalid choice: 'zip'": ["convert", "nowhere", "out", "--to", "zip"],
    "-n/--n_samples: given as 2 and as 3; give it once": ["sample", "-r", "nowhere", "-n", "2", "--n_samples", "3"],
    "-r/--resume: given as a and as b; give it once": ["evaluate", "-r", "a", "-r", "b"],
    "--resume: given as a and as b; give it once": ["distill", "--resume", "a", "--resume", "b"],
    "--sampler: ddim, but -v is --sampler ddpm": ["sample", "-r", "nowhere", "-v", "--sampler", "ddim"],
    "--labels: must be at least 0, got -1": ["sample", "-r", "nowhere", "--labels", "0", "-1"],
    "--guidance: give at least one value before null_label=2": ["sample", "-r", "x", "--guidance", "null_label=2"],
    "argument --labels: invalid int value: 'x'": ["sample", "-r", "nowhere", "--labels", "x", "null_label=2"],
    "--first_stage: vq, and first_stage=x; give one": ["sample", "-r", "m", "--first_stage", "vq", "first_stage=x"],
    "--first_stage: y, and first_stage=z; give one": ["sample", "-r", "m", "first_stage=z", "--first_stage", "y"],
    "use_ema: True as a hint, but --raw says False; give one": ["sample", "-r", "m", "--raw", "use_ema=true"],
    "--batch_size: must be at least 1": ["decode", "x", "--first_stage", "y", "-o", "z", "--batch_size", "0"],
    "teacher.ckpt: nowhere": ["distill", "--base", "quickstart", "teacher.ckpt=nowhere"],  # the last: imports torch
}


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, ...], tuple[int, str, str, list[str]]]:
    """(exit code, output, errors, heavy modules imported so far) of command lines that run in one process."""
    calls = [*HELPED, *LISTED, *REFUSED.values()]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(calls)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {tuple(call): tuple(answer) for call, answer in zip(calls, json.loads(printed), strict=True)}


def test_help_lists_and_mistakes_import_no_torch(answers: dict) -> None:
    heavy = {call: answer[3] for call, answer in answers.items() if answer[3]}
    assert [*heavy] == [tuple([*REFUSED.values()][-1])] and "lightning" not in str(heavy)


def test_help_and_version_are_printed(answers: dict) -> None:
    for call in HELPED:
        code, out, err, _ = answers[tuple(call)]
        assert (code, err) == (0, ""), call
        if "--version" in call:
            assert out == f"ldm_dkdm {dkdm.__version__}\n"
        else:
            assert out.startswith(f"usage: dkdm {call[0]} " if len(call) == 2 else "usage: dkdm COMMAND")
    assert all(f"  {name} " in answers["-h",][1] for name in COMMANDS)


def test_keys_are_listed_with_their_defaults(answers: dict) -> None:
    assert all(answers[tuple(call)][0] == 0 for call in LISTED)
    assert "trainer.max_steps  (whole number, at least 1; required)" in answers["distill", "--keys", "trainer"][1]
    assert "distill." not in answers["distill", "--keys", "trainer"][1]
    assert "distill." in answers["distill", "--keys"][1]
    assert "data.fraction  (number, above 0, at most 1; default: 1.0)" in answers["train", "--keys", "data"][1]


@pytest.mark.parametrize(("words", "call"), REFUSED.items(), ids=[" ".join(call) for call in REFUSED.values()])
def test_a_mistake_is_one_line_and_exit_code_2(words: str, call: list[str], answers: dict) -> None:
    code, out, err, _ = answers[tuple(call)]
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert words in err


def test_values_of_a_flag_add_up_and_hints_may_stand_among_them() -> None:
    given = "x=1 -r A --labels 0 1 null_label=2 --guidance 1 -r B -n 2 --labels 2 --guid 3 2.y=4 --compile z=5 -n 2"
    options = parser_of("sample").parse_args(given.split())
    assert (options.resume, options.labels, options.guidance) == (["A", "B"], [0, 1, 2], [1.0, 3.0])
    assert sorted(options.hints) == ["2.y=4", "null_label=2", "x=1", "z=5"] and options.compile == "true"
    given = "a --metrics kid b.x=1 --metrics fid sfid --labels 1 y=2"
    options = parser_of("evaluate").parse_args(given.split())
    assert (options.metrics, options.hints) == (["kid", "fid", "sfid"], ["a", "b.x=1", "y=2"])


PLUGIN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width, timesteps=20, **others):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.time = nn.Embedding(timesteps, width)
        self.scale = torch.linspace(0.5, 1, width).view(1, -1, 1, 1)  # neither a parameter nor a buffer
        self.register_buffer("shift", torch.ones(1, width, 1, 1), persistent=False)

    def forward(self, x, t, label=None):
        return self.outer(torch.tanh(self.scale * self.inner(x) + self.time(t)[:, :, None, None] + self.shift))
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    """A file with a network; what is known of it goes with the test, as it would with a process."""
    path = tmp_path / "toynet.py"
    path.write_text(PLUGIN)
    known = dict(NETWORKS)
    yield path
    _forget(known)


def _forget(known: dict) -> None:
    for name in set(NETWORKS) - set(known):
        del NETWORKS[name]
    sys.modules.pop("toynet", None)


def test_a_network_by_plugin_distils_samples_and_evaluates_and_is_refused_without(
    plugin: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = {"target": "toynet.Net", "params": {"width": 16, "depth": 3}}
    config = distill_config(teacher_folder, tmp_path / "logs", student=student)
    base, run = write_yaml(tmp_path / "own.yaml", config), tmp_path / "logs" / "run"
    known, use = dict(NETWORKS), ("--plugin", plugin)
    assert_one_error_line(capsys, distil("--base", base), ("student.target: 'toynet.Net'", "--plugin FILE.py"))
    assert not run.exists()
    assert distil("--base", base, *use) == 0
    assert sample("-r", run, "-n", 2, "-c", 2, "--latents", "-l", tmp_path / "samples", *use) == 0
    assert run_script("evaluate.py", "-r", run, "-n", 0, "-c", 2, "--chains", 2, *use) == 0
    figures = json.loads((run / "student" / "evaluation.json").read_text())
    trained, untrained = (figures[name] for name in ("agreement_q1", "untrained_q1"))
    assert figures["student_parameters"] == 16 * 20 + 2 * 16 * 27 + 16 + 3 and trained != untrained
    assert run_script("inspect_checkpoint.py", run, *use) == 0
    assert run_script("convert.py", run, tmp_path / "own.safetensors", "--to", "safetensors", *use) == 0
    model = dkdm.load_model(run)
    assert torch.equal(model.network.shift, torch.ones(1, 16, 1, 1))  # what the file does not hold is as it was made
    _forget(known)
    capsys.readouterr()
    before = contents(tmp_path)
    assert sample("-r", run) == 2
    assert run_script("evaluate.py", "-r", run) == 2
    assert run_script("convert.py", run, "x", "--to", "adm") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(f"{run / 'student'}: its network is toynet.Net" in line for line in errors)
    assert all("--plugin FILE.py" in line for line in errors) and contents(tmp_path) == before
    weights = load_file(run / "student" / "student.safetensors")
    assert all(torch.equal(model.network.state_dict()[name], weights[name]) for name in weights)


def test_a_plugin_trains_and_goes_on(plugin: Path, teacher_folder: Path, tmp_path: Path) -> None:
    student = {"target": "toynet.Net", "params": {"width": 16}}
    for name, steps in (("whole", 6), ("halves", 3)):
        config = distill_config(teacher_folder, tmp_path, student=student, trainer={"max_steps": steps})
        config["logging"]["name"] = name
        assert distil("--base", write_yaml(tmp_path / f"{name}.yaml", config), "--plugin", plugin) == 0
    assert distil("--resume", tmp_path / "halves", "trainer.max_steps=6", "--plugin", plugin) == 0
    whole, halves = (load_file(tmp_path / name / "student" / "student.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.py", None, ("absent.py", "no such file")),
        ("broken.py", "import nowhere_at_all", ("broken.py", "cannot be imported", "nowhere_at_all")),
        ("broken.py", "class Net(:", ("broken.py", "cannot be imported", "SyntaxError")),
        ("empty.py", "x = 1", ("empty.py", "no nn.Module class")),
        ("torch.py", PLUGIN, ("torch.py", "another module is called torch", "rename")),
        ("json.py", PLUGIN, ("json.py", "another module is called json", "rename")),
        ("net.txt", PLUGIN, ("net.txt", "not a Python file")),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    name: str, text: str | None, words: tuple[str, ...], teacher_folder: Path, tmp_path: Path, capsys
) -> None:
    before = sys.modules.get(Path(name).stem)
    if text is not None:
        (tmp_path / name).write_text(text)
    code = sample("-r", teacher_folder, "-n", 1, "-c", 1, "-l", tmp_path / "out", "--plugin", tmp_path / name)
    assert_one_error_line(capsys, code, ("--plugin", *words))
    assert sys.modules.get(Path(name).stem) is before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, ("student.params.width: missing", "Net")),
        ({"width": "wide"}, ("student.params", "Net cannot be built")),
        ({"width": 16, "timesteps": 5}, ("student", "cannot be called as network")),
    ],
)
def test_bad_parameters_of_a_plugin_s_network_are_named(
    params: dict, words: tuple[str, ...], plugin: Path, teacher_folder: Path, tmp_path: Path, capsys
) -> None:
    config = distill_config(teacher_folder, tmp_path / "logs", student={"target": "toynet.Net"})
    config["student"]["params"] = params
    base = write_yaml(tmp_path / "own.yaml", config)
    assert_one_error_line(capsys, distil("--base", base, "--plugin", plugin), words)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_a_begun_demo_goes_on(begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stop(options: argparse.Namespace) -> None:
        calls.append(options)
        raise Stopped("time is up")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "run", stop)
    if begun:
        demo.RUN.mkdir(parents=True)
        (demo.RUN / "config.yaml").write_text("")
    with pytest.raises(Stopped, match="dkdm demo also continues it"):
        demo.run(argparse.Namespace(overrides=["trainer.max_minutes=1"]))
    assert calls[0].resume == (str(demo.RUN) if begun else None)
    words = [*calls[0].base, *calls[0].overrides]
    assert words[-1] == "trainer.max_minutes=1" and ("quickstart" in words) != begun


@pytest.mark.parametrize("override", ["logging.name=mine", "logging={dir: x}", "teacher.ckpt=models/other"])
def test_a_demo_elsewhere_is_refused_before_its_work(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main("demo", [override, "logging.dir=logs" if "dir" not in override else "trainer.max_steps=1"])
    key = {"logging={dir: x}": "logging.dir"}.get(override, override.partition("=")[0])
    assert_one_error_line(capsys, end.value.code, (f"error: {key}: the demo distils ", "into logs/quickstart"))
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_goes_on_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert how_to_go_on("distill", Path("logs/a")) == "continue with: dkdm distill --resume logs/a"
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "0")
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", **ranks}.items():
        monkeypatch.setenv(name, value)
    assert how_to_go_on("train", Path("b")) == "continue with: dkdm train --resume b, with torchrun as now"


def test_sampling_compiles_what_it_is_asked_to(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: asked.append(type(module).__name__))
    words = ("-r", teacher_folder, "-n", 1, "-c", 2, "--no_png")
    for choice, found in (("auto", []), ("false", []), ("true", ["UNet", "Decoder"])):
        assert sample(*words, "--compile", choice, "-l", tmp_path / choice, "--device", "cpu") == 0
        assert asked == found


def test_a_key_of_many_values_is_named_and_the_last_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        (tmp_path / f"step={step}.ckpt").touch()
    parser_of("evaluate").parse_args([f"{tmp_path}/step=1.ckpt", f"{tmp_path}/step=2.ckpt"])  # paths that exist
    options = parser_of("distill").parse_args(["-b", "quickstart", *(f"trainer.max_steps={n}" for n in (7, 7, 8))])
    assert parser_of("sample").parse_args(["x=1", "-r", "m", "x=2", "--raw", "y=3"]).hints == ["x=1", "x=2", "y=3"]
    said = ("trainer.max_steps: given as 7 and as 8", "x: given as 1 and as 2")
    assert caplog.messages == [f"{text}; the last one counts" for text in said]
    assert load_config(["quickstart"], options.base[1:] + options.overrides).trainer.max_steps == 8
