"""README and docs: every command line parses, every link leads somewhere, and blocks marked to run do run.

A fenced block says by its language how far it is checked:

- `bash`: real commands; each line must parse, with known options and existing recipes;
- `python`: must compile;
- `text`: schematic; only commands and option names are checked, as in inline code.

`<!-- run -->` on the line before a bash or python block: it is run, in a folder that holds the repository's configs/,
scripts/, and its models/ with a teacher of fewer timesteps. `<!-- run: A -> B; C -> D -->` replaces texts first, so
that it takes seconds.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from ldm_dkdm import load_model
from ldm_dkdm.commands.arguments import split_base
from ldm_dkdm.commands.main import parser_of
from ldm_dkdm.commands.world import world_overrides
from ldm_dkdm.config.keys import RUNS
from ldm_dkdm.config.load import load_config
from tests.parts import of_few_timesteps

ROOT = Path(__file__).parents[1]
TEACHER = Path("models", "teachers", "emoji64")
TIMESTEPS = 25  # of the teacher of marked blocks
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "dkdm_ldm.py": "distill",
    "txt-free_sample.py": "sample",
    "decode_latents.py": "decode",
    "train_ldm.py": "train",
    "train_first_stage.py": "train-first-stage",
    "convert.py": "convert",
    "inspect_checkpoint.py": "inspect",
    "evaluate.py": "evaluate",
}
BLOCK = re.compile(
    r"(?:^ *<!-- run(?P<edits>.*?)-->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
OPTION = re.compile(r"(?:^|[\s\[])(--?[a-zA-Z][\w-]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `edits` is None unless the block is marked to run."""

    language: str
    text: str
    edits: tuple[tuple[str, str], ...] | None

    def edited(self) -> str:
        """The text with its replacements made; each must have something to replace."""
        text = self.text
        for old, new in self.edits or ():
            assert old in text, f"<!-- run -->: '{old}' is not in the block"
            text = text.replace(old, new)
        return text


def blocks(page: Path) -> list[Block]:
    return [
        Block(match["language"], dedent(match["text"]), None if match["edits"] is None else _edits(match["edits"]))
        for match in BLOCK.finditer(page.read_text())
    ]


def _edits(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [pair.split(" -> ") for pair in text.strip().removeprefix(":").split(";") if pair.strip()]
    return tuple((old.strip(), new.strip()) for old, new in pairs)


def _is_command(line: str) -> bool:
    return bool(re.match(r"dkdm [a-z-]|python (scripts|benchmarks)/|make [a-z]", line))


def full_lines(page: Path) -> Iterator[str]:
    """The command lines of the bash blocks."""
    for block in blocks(page):
        if block.language == "bash":
            yield from (line for line in block.text.splitlines() if line.strip() and not line.startswith("#"))


def loose_lines(page: Path) -> Iterator[str]:
    """Commands in schematic blocks, continued lines joined, and in inline code."""
    for block in blocks(page):
        if block.language == "text":
            joined = re.sub(r"\n +", " ", block.text)
            yield from (line.partition(" #")[0] for line in joined.splitlines() if _is_command(line))
    prose = BLOCK.sub("", page.read_text())
    yield from (code for code in re.findall(r"`([^`]+)`", prose.replace("\n", " ")) if _is_command(code))


def _target(words: list[str]) -> tuple[str | None, list[str]]:
    """The `dkdm` command of a line, None where it is another program that exists, and its arguments."""
    if words[0] == "dkdm":
        return words[1], words[2:]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), f"no such target: {words[1]}"
        return None, []
    if words[0] in ("torchrun", "srun"):
        return _target(_started(words))
    assert words[0] == "python", f"unknown program: {words[0]}"
    assert (ROOT / words[1]).is_file(), f"no such file: {words[1]}"
    return SCRIPTS.get(Path(words[1]).name), words[2:]


def _started(words: list[str]) -> list[str]:
    """The command that a launcher starts; torchrun's own options must parse, and so must those of Kubeflow's pods."""
    if words[0] == "srun":
        return list(dropwhile(lambda word: word.startswith("--") and "=" in word, words[1:]))
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words[1:])
    return [*([] if options.no_python else ["python"]), options.training_script, *options.training_script_args]


def _require_config(command: str, arguments: list[str]) -> None:
    """Load the config that a training command names: recipes exist, keys are known, values are in range."""
    options = parser_of(command).parse_args(arguments)
    if getattr(options, "base", None):
        files, overrides = split_base(options.base, options.overrides)
        load_config(files, [*overrides, *world_overrides(options, overrides)], {r.COMMAND: r for r in RUNS}[command])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_parse(page: Path) -> None:
    for line in full_lines(page):
        words = shlex.split(line, comments=True)
        if words == ["dkdm", "--version"]:
            continue
        command, arguments = _target(words)
        if command is not None:
            _require_config(command, arguments)


def test_the_pods_of_kubernetes_run_commands_that_parse() -> None:
    jobs = [yaml.safe_load(b.text) for b in blocks(ROOT / "docs" / "clusters.md") if b.language == "yaml"]
    pods = [part["template"]["spec"] for job in jobs for part in job["spec"]["pytorchReplicaSpecs"].values()]
    assert len(pods) == 2
    for container in (container for pod in pods for container in pod["containers"]):
        command, arguments = _target(container["command"])
        assert command is not None
        _require_config(command, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentioned_commands_and_options_exist(page: Path) -> None:
    for line in loose_lines(page):
        command, _ = _target(line.split())
        if command is not None:
            known = {name for action in parser_of(command)._actions for name in action.option_strings}
            assert set(OPTION.findall(line)) <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:  # mkdocs build --strict checks those of docs/
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).is_file()] == []


def test_the_rooms_of_the_architecture_are_those_of_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = text.partition("## Rooms")[2].partition("Imports run")[0].splitlines()[4:]
    named = [name for row in rows if "|" in row for name in re.findall(r"`([\w/.]+)`", row.split("|")[1])]
    package = ROOT / "ldm_dkdm"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(files | {f"{path.parent.name}/" for path in package.glob("*/__init__.py")})


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 200


def _script(page: Path, language: str) -> str:
    return "\n".join(b.edited() for b in blocks(page) if b.language == language and b.edits is not None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's models/, the teacher with few of its timesteps, so that its chains take few calls."""
    folder = tmp_path_factory.mktemp("pages") / "models"
    (folder / "teachers").mkdir(parents=True)
    (folder / "first_stage").symlink_to(ROOT / "models" / "first_stage")
    of_few_timesteps(load_model(ROOT / TEACHER), TIMESTEPS).save(folder / "teachers" / TEACHER.name)
    return folder


@pytest.mark.parametrize("language", ["bash", "python"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marked_blocks_run(
    page: Path,
    language: str,
    models: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = _script(page, language)
    if not script:
        return
    for name, folder in {"configs": ROOT / "configs", "models": models, "scripts": ROOT / "scripts"}.items():
        (tmp_path / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDM_DKDM_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-pages"))
    if language == "python":
        exec(compile(script, page.name, "exec"), {"__name__": "__main__"})
        return
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    ended = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
