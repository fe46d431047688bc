"""What command lines share: `--base` and `key=value`, hints, plugins, keys and flags in errors."""

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from ldm_dkdm.commands.parser import Parser
from ldm_dkdm.commands.world import world_overrides
from ldm_dkdm.config.checked import hints_of
from ldm_dkdm.config.keys import keys_text
from ldm_dkdm.config.load import load_config, read_overrides
from ldm_dkdm.config.recipes import find_config, recipe_names
from ldm_dkdm.config.schema import (
    DiffusionConfig,
    DiffusionDataConfig,
    DiffusionRun,
    DistillConfig,
    DistillRun,
    FirstStageRun,
    LoggingConfig,
    TeacherConfig,
    TrainerConfig,
)
from ldm_dkdm.device import is_first_rank, started
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import exists, expanded
from ldm_dkdm.training.finding import find_run, given_paths
from ldm_dkdm.training.run_folder import RunFolder, check_run, run_folder

T = TypeVar("T", DistillRun, DiffusionRun, FirstStageRun)
HINTS = {
    **hints_of(TeacherConfig),
    **hints_of(DiffusionConfig),
    "first_stage": str,
    "verify": bool,
}  # types of the hints
ASKING = ("SIGINT", "SIGTERM", "SIGHUP")  # a closed terminal sends the last, which Windows does not have
SIGNALS = tuple(getattr(signal, name) for name in ASKING if hasattr(signal, name))  # ask a training to save and stop


@dataclass(frozen=True)
class TrainingCall(Generic[T]):
    """A validated config, the run folder, and whether `--resume` named it."""

    config: T
    folder: RunFolder
    resumed: bool

    @property
    def begun(self) -> Path | None:
        """The run folder that `--resume` named, around which relative paths are looked for."""
        return self.folder.path if self.resumed else None


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """`--base FILE [FILE ...] [key=value ...]` for a new run, `--resume RUN|last [key=value ...]` for an old one."""
    if isinstance(parser, Parser):
        parser.hint = "keys are set as key=value, for example trainer.max_steps=1000; see --help"
    parser.add_argument(
        "-b",
        "--base",
        nargs="+",
        action="extend",
        default=[],
        metavar="YAML|key=value",
        help="config files or names of recipes, merged left to right, then overrides",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example trainer.max_steps=1000")
    parser.add_argument("--resume", metavar="RUN|last", help="continue a run folder with its own configuration")
    parser.add_argument("--keys", nargs="?", const="", metavar="SECTION", help="list the keys of the config and exit")
    add_plugin_argument(parser)


def add_plan_argument(parser: argparse.ArgumentParser) -> None:
    """`--plan`."""
    parser.add_argument("--plan", action="store_true", help="print what the run will cost and exit")


def print_plan(lines: Mapping[str, str], time_needed: Callable[[], Mapping[str, str]]) -> None:
    """Print the lines of a plan, then the time, which is measured meanwhile."""
    width = max(map(len, lines))
    for subject, value in lines.items():
        print(f"{subject:<{width}}  {value}", flush=True)
    print("timing a few iterations on this machine ...", file=sys.stderr)
    for subject, value in time_needed().items():
        print(f"{subject:<{width}}  {value}")


def read_training_call(options: argparse.Namespace, schema: type[T]) -> TrainingCall[T]:
    """Load the config of a new run, or of the run that `--resume` names."""
    files, overrides = split_base(options.base, options.overrides)
    overrides += world_overrides(options, overrides)
    if options.resume:
        if files:
            raise UserError("--resume: a run has its own configuration; leave --base out (key=value still works)")
        folder = find_run(options.resume, schema, _logs(overrides))
        config = given_paths(load_config(folder.path / "config.yaml", overrides, schema, of_run=True), folder.path)
        check_run(config, folder, resumed=True)
        if is_first_rank():  # a rank that starts later sees what this one has tidied
            folder.require_no_model()
        return TrainingCall(config, folder, True)
    if not files:
        names = ", ".join(name for name in recipe_names() if "/" not in name)
        raise UserError(f"--base: name at least one config file or recipe, for example --base quickstart ({names})")
    config = load_config(files, overrides, schema, of_run=True)
    folder = run_folder(config.logging, "+".join(Path(f).stem for f in files), schema)
    if not (folder.path / "config.yaml").is_file():
        load_config(files, overrides, schema)  # refuses keys without effect; the run of an older version goes on
    return TrainingCall(config, folder, False)


def _logs(overrides: Sequence[str]) -> Path:
    """Where `--resume last` looks: in logging.dir, if the command line gives it."""
    written = [item for item in overrides if item.partition("=")[0] in ("logging", "logging.dir")]
    section = read_overrides(written, {"logging": LoggingConfig}).get("logging") if written else None
    return expanded((section.get("dir") if isinstance(section, Mapping) else None) or "logs")


def print_keys(options: argparse.Namespace, schema: type) -> bool:
    """Print the keys of a config if `--keys` asks for them; returns whether it did."""
    if options.keys is None:
        return False
    try:
        print(keys_text(schema, options.keys or None))
    except UserError as error:
        raise UserError(f"--keys: {error}") from error
    return True


def split_base(base: Sequence[str], rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """The config files or recipes and the overrides, which may follow them after `--base`."""
    files = [item for item in base if is_path(item)]
    files += [item for item in rest if item.endswith((".yaml", ".yml")) and is_path(item)]
    for name in files:
        find_config(name)  # a wrong name is reported before a wrong key
    return files, [item for item in [*base, *rest] if item not in files]


def is_path(item: str) -> bool:
    """Whether a word of a command line is a path, which may hold a =, and no key=value: keys have no /."""
    return "=" not in item or "/" in item.partition("=")[0] or exists(item)


def add_hints(parser: argparse.ArgumentParser) -> None:
    """`key=value` for what tensor shapes of a third-party checkpoint do not show."""
    parser.add_argument(
        "hints",
        nargs="*",
        metavar="key=value",
        help="what the checkpoint does not store: image_size=64 num_head_channels=32 schedule=cosine ...",
    )
    add_first_stage_argument(parser)
    add_plugin_argument(parser)


def add_first_stage_argument(parser: argparse.ArgumentParser) -> None:
    """`--first_stage DIR`, as the hint `first_stage=DIR` or the key `first_stage.ckpt=DIR`."""
    shown = "first stage, if not the one that the model points to"
    parser.add_argument("--first_stage", dest="stage", metavar="DIR", help=shown)


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """`--plugin FILE`: the user's own networks."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=expanded,
        metavar="FILE.py",
        help="Python file whose nn.Module classes may be named as FILE.Class",
    )


def read_hints(items: Sequence[str]) -> dict[str, Any]:
    """Hints of a command line without further paths.

    Raises:
        UserError: an item that is not key=value.
    """
    for item in items:
        if "=" not in item:
            raise UserError(f"'{item}': one argument too many; hints look like key=value, such as image_size=64")
    return read_overrides(items, HINTS)


def load_plugins(files: Sequence[Path]) -> None:
    """Import the user's files and add their nn.Module classes to NETWORKS as FILE.Class.

    A class whose name occurs once is added as __main__.Class too, the name that a notebook or a script gives it.

    Raises:
        UserError: no such file, one that cannot be imported or defines no network.
    """
    classes: dict[str, list[type]] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"--plugin: {file}: no such file")
        from torch import nn

        from ldm_dkdm.networks import NETWORKS

        module = _imported(file)
        found = [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == file.stem
        ]
        if not found:
            del sys.modules[file.stem]
            raise UserError(f"--plugin: {file}: defines no nn.Module class")
        NETWORKS.update({f"{file.stem}.{kind.__name__}": kind for kind in found})
        for kind in set(found):
            classes.setdefault(kind.__name__, []).append(kind)
    for name, kinds in classes.items():
        if len(kinds) == 1:
            NETWORKS[f"__main__.{name}"] = kinds[0]


def _imported(file: Path) -> ModuleType:
    """Import a Python file under its name, which must not be another module's."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin: {file}: is not a Python file; its name ends in .py")
    loaded = sys.modules.get(file.stem)
    if file.stem in sys.stdlib_module_names or (loaded and getattr(loaded, "__file__", None) != spec.origin):
        raise UserError(f"--plugin: {file}: another module is called {file.stem}; rename the file")
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[file.stem]
        raise UserError(f"--plugin: {file}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


SECTIONS = {
    "teacher": {f.name for f in fields(TeacherConfig)},
    "distill": {f.name for f in fields(DistillConfig)},
    "trainer": {f.name for f in fields(TrainerConfig)},
    "logging": {f.name for f in fields(LoggingConfig)},
    "data": {f.name for f in fields(DiffusionDataConfig)},
}
DISTILLATION = {f.name for f in fields(DistillRun)}


def how_to_go_on(command: str, run: Path) -> str:
    """How a stopped training continues, for its message."""
    world = started()
    launcher = f", with {world.by} as now" if world is not None and world.ranks > 1 else ""
    return f"continue with: dkdm {command} --resume {run}{launcher}"


@contextmanager
def dotted_keys(*sections: str, path: str | None = None) -> Iterator[None]:
    """Prefix parameters in the library's errors with the config's section: `rho: ...` -> `distill.rho: ...`.

    `path` is the key that prefixes messages about the file that it names.
    """
    try:
        yield
    except UserError as error:
        name = str(error).partition(":")[0].partition(".")[0]
        owner = next((section for section in sections if name in SECTIONS[section]), None)
        if owner:
            raise UserError(f"{owner}.{error}") from error
        raise UserError(f"{path}: {error}" if path and name not in DISTILLATION else str(error)) from error


@contextmanager
def flags(**names: str) -> Iterator[None]:
    """Replace parameters in the library's errors by flags: `steps: ...` -> `--custom_steps: ...`.

    An entry of a list counts as its parameter: `labels[0]: ...` -> `--labels: ...`.
    """
    try:
        yield
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        flag = names.get(name.partition("[")[0])
        raise UserError(f"{flag}{colon}{rest}" if flag else str(error)) from error
