"""Find run folders, and what their configurations name by relative paths."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from ldm_dkdm.config.checked import Section
from ldm_dkdm.config.load import RUN_KIND, card_kind, fits, read_yaml
from ldm_dkdm.config.schema import FirstStageCard, ModelCard, NewNetworkConfig
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import exists, expanded
from ldm_dkdm.training.run_folder import IMAGES, POINTERS, RunConfig, RunFolder

S = TypeVar("S", bound=Section)
N = TypeVar("N", bound=NewNetworkConfig)
R = TypeVar("R", bound=RunConfig)
NEW_RUN = "start a new run (logging.name=NEW, in Python out)"
WORDS = ("random", "teacher")  # values of path keys that are not paths: those of `init`


def located(path: str, run: Path) -> str:
    """A relative path in a run's config, looked for in the folders around the run, then where the process works.

    The root is not looked in: `data` would find /data.
    """
    if not expanded(path).is_absolute():
        around = (*run.absolute().parents, *run.resolve().parents)
        for folder in (place for place in around if place != place.parent):
            if (found := folder / path).exists():
                return path if Path(path).exists() and found.samefile(path) else str(found)
    return path


def located_paths(section: S, run: Path | None) -> S:
    """A section of a run's config with its paths `located`; as it is without a run."""
    paths = {f.name: getattr(section, f.name) for f in fields(section) if f.metadata.get("path")}
    found = {name: located(path, run) for name, path in paths.items() if run and path and path not in WORDS}
    return replace(section, **found) if found != paths else section


def network_to_train(section: N, folder: RunFolder, run: Path | None) -> N:
    """The section of a run's network with its paths `located`, without `init` where a checkpoint has the weights."""
    found = located_paths(section, run)
    return found if folder.latest() is None else replace(found, init="random")


def given_paths(config: R, run: Path) -> R:
    """The config of a resume, in which a path that the user gives anew means what it names where the process works."""
    stored = read_yaml(run / "config.yaml")
    for key in (*POINTERS, *IMAGES):
        section, _, name = key.partition(".")
        path = getattr(getattr(config, section, None), name, None)
        if path in (None, OmegaConf.select(stored, key)) or not exists(path) or expanded(path).is_absolute():
            continue
        if located(path, run) != path:  # around the run it would be another file
            changed = replace(getattr(config, section), **{name: str(Path(path).absolute())})
            config = replace(config, **{section: changed})
    return config


def require_same_count(folder: RunFolder, fact: str, count: int, path: str | None) -> None:
    """Refuse images that are more or fewer than those that a run began with, as its model's card counts them.

    Raises:
        UserError: both numbers; runs of older versions do not say theirs.
    """
    before = _fact(folder, fact)
    if before not in (None, count):
        raise UserError(
            f"{path}: gives {count} images, and {folder.path} began with {before}; name the same images, or {NEW_RUN}"
        )


def require_same_classes(folder: RunFolder, names: Sequence[str]) -> None:
    """Refuse other classes than a run began with, as its model's card names them: labels would change.

    Raises:
        UserError: the first label that differs; runs of older versions may not say theirs.
    """
    for label, (before, now) in enumerate(zip_longest(_fact(folder, "classes") or (), names)):
        if before is not None and before != now:
            raise UserError(
                f"data.path: label {label} is {now or 'no class'} now, and {folder.path} began with {before}; give the "
                f"folders their names back, or {NEW_RUN}"
            )


def _fact(folder: RunFolder, name: str) -> Any:
    """A fact in the card of a run's model; None where there is none."""
    card = folder.model / "config.yaml"
    return OmegaConf.select(read_yaml(card), f"info.{name}") if card.is_file() else None


def find_run(name: str, schema: type[RunConfig], logs: Path = Path("logs")) -> RunFolder:
    """The run folder to resume; `last` is the most recent one of its kind in logs/, at any depth.

    The run's config.yaml, its checkpoints/ and the newest checkpoint there mean the run.

    Raises:
        UserError: there is none.
    """
    if name == "last":
        runs = [folder for folder in _runs_below(logs) if _is_run_of(folder, schema)]
        if not runs:
            raise UserError(f"--resume last: {logs}/ holds no run of dkdm {schema.COMMAND}; name its folder instead")
        return RunFolder(max(runs, key=newest_change), schema.MODEL)
    folder = RunFolder(_run_of(name), schema.MODEL)
    if not (folder.path / "config.yaml").is_file():
        raise UserError(f"--resume: {name} is not a run folder (it has no config.yaml)")
    if (found := card_kind(folder.path / "config.yaml")) in (ModelCard.KIND, FirstStageCard.KIND):
        raise UserError(f"--resume: {name} is {found}; name the run folder that it is in")
    return folder


def _run_of(name: str) -> Path:
    """The run folder that a path means: itself, or that of a config, of checkpoints, of the newest checkpoint.

    Raises:
        UserError: a file in checkpoints/ that is not the newest checkpoint.
    """
    path = expanded(name)
    if (path / "config.yaml").is_file():
        return path
    if path.name == "config.yaml" and path.is_file():
        return path.parent
    if path.name == "checkpoints" and (path.parent / "config.yaml").is_file():
        return path.parent
    run = path.parent.parent
    if path.parent.name == "checkpoints" and (run / "config.yaml").is_file():
        newest = RunFolder(run).latest()
        if newest is None or path.name != newest.name:
            found = f"which is {newest.name}" if newest else "and has none"
            raise UserError(f"--resume: {name}: a run goes on from its newest checkpoint, {found}; name {run}")
        return run
    return path


def _runs_below(logs: Path) -> Iterator[Path]:
    """The run folders of any kind below a folder; what is in them is not walked, and every folder once."""
    seen: set[Path] = set()
    for place, folders, files in os.walk(logs, followlinks=True):
        folder, real = Path(place), Path(place).resolve()
        is_run = folder != logs and "config.yaml" in files and _kind(folder) == RUN_KIND
        if is_run and real not in seen:
            yield folder
        if is_run or real in seen:
            folders.clear()
        folders.sort()
        seen.add(real)


def _kind(folder: Path) -> str | None:
    try:
        return card_kind(folder / "config.yaml")
    except UserError:  # third-party, or damaged
        return None


def _is_run_of(folder: Path, schema: type[RunConfig]) -> bool:
    return fits(read_yaml(folder / "config.yaml"), schema)


def newest_change(folder: Path) -> float:
    """When a run last saved something."""
    return max(f.stat().st_mtime for f in [folder / "config.yaml", *folder.glob("checkpoints/*")])
