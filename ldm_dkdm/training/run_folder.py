"""Create, find and resume run folders."""

import dataclasses
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm_dkdm.config.batches import SECTIONS
from ldm_dkdm.config.load import load_config, parse, read_yaml
from ldm_dkdm.config.process_section import ONCE_UNSAID
from ldm_dkdm.config.schema import DiffusionRun, DistillRun, FirstStageRun, LoggingConfig
from ldm_dkdm.config.text import plain_values, written
from ldm_dkdm.device import is_first_rank
from ldm_dkdm.errors import UserError, legible
from ldm_dkdm.files import expanded, make_folder, require_file, write_text
from ldm_dkdm.reporting import logger

RunConfig = DistillRun | DiffusionRun | FirstStageRun
FREE = ("trainer", "logging")  # sections that may change when a run is resumed
FIXED = ("trainer.seed", "trainer.accumulate")  # keys in FREE that may not
UNSEEN = ("distill.pool_storage",)  # keys that change no batch: any command may change them
ONE = ("trainer.devices", "trainer.num_nodes")  # keys whose default was 1; null is as many without a launcher
UNSAID = ("teacher.use_ema", *(f"diffusion.{key}" for key in ONCE_UNSAID))  # a resume may say what the run did not
NAMED = 3  # keys that a message names, of those that differ
IN_MEMORY = "a model made in Python"  # begins the name of a teacher without a file, which ends with its hash
PLACE = ("logging.name", "logging.dir")  # keys in FREE that say where a run is, which a resume does not move
POINTERS = ("teacher.ckpt", "first_stage.ckpt", "loss.perceptual_backbone")  # paths; a hash says whether they changed
IMAGES = ("data.path", "data.synthetic", "data.held_out")  # paths, which a resume neither adds nor leaves out
LONGEST_NAME = 255  # bytes, on the file systems in use
PENDING = ".pending"  # end of the name of a checkpoint without its model
_NAME = re.compile(r"step=(\d+)\.ckpt")


@dataclass(frozen=True)
class RunFolder:
    """logs/<run>: config.yaml, checkpoints/, samples/, the loggers' files and the model folder.

    Attributes:
        path: logs/<run>.
        model_name: name of a new model folder: student, model or first_stage.
    """

    path: Path
    model_name: str = "student"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints and pools."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The model folder, with the EMA weights; in a run of an older version it may have another name."""
        from ldm_dkdm.checkpoints.source import home_of  # it imports torch

        found = home_of(self.path)
        return found if found != self.path else self.path / self.model_name

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = checkpoints(self.checkpoints)
        return found[-1] if found else None

    def require_no_model(self) -> None:
        """Refuse to begin a run anew over its model where no checkpoint is left.

        Raises:
            UserError: names the model folder.
        """
        model = self.path / self.model_name
        saving = any(self.checkpoints.glob(f".step=*{PENDING}"))  # a process was killed in its first save
        if (model / "config.yaml").is_file() and self.latest() is None and not saving:
            raise UserError(
                f"{model}: is the model of a run without checkpoints, which would begin again and replace it; put them "
                f"into {self.checkpoints}, move the model away, or start a new run (logging.name=NEW, in Python out)"
            )


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(f for f in folder.glob("step=*.ckpt") if _NAME.fullmatch(f.name))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None  # `checkpoints` finds no others
    return int(match[1])


def open_run(config: RunConfig, folder: RunFolder, resumed: bool = False) -> None:
    """Create the folder, or continue in it (`check_run`)."""
    check_run(config, folder, resumed)
    stored, text = folder.path / "config.yaml", config_text(config)
    if is_first_rank() and (not stored.is_file() or stored.read_text() != text):
        write_text(stored, text)


@contextmanager
def alone_in(folder: RunFolder) -> Iterator[None]:
    """Lock a run folder against other processes while it trains; the lock ends with the process.

    Raises:
        UserError: another process trains there.
    """
    if not is_first_rank():
        yield
        return
    make_folder(folder.path)
    lock = folder.path / ".lock"
    require_file(lock)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder.path}: another process trains there; wait, or set logging.name=NEW") from error
        except OSError as error:  # some network file systems have no locks
            logger.warning(f"{folder.path}: not locked against a second process ({error.strerror})")
        yield


def check_run(config: RunConfig, folder: RunFolder, resumed: bool) -> None:
    """Refuse to continue in the folder of another run; nothing is written.

    Args:
        config: must be the one that the folder was made with, but for UNSEEN; if `resumed`, FREE may differ except for
            FIXED, and PLACE may name the folder that it is.
        folder: logs/<run>.
        resumed: the user asked to resume the run.
    """
    stored = folder.path / "config.yaml"
    if not stored.is_file():
        return
    if stored.read_bytes() == config_text(config).encode():
        return
    before, now = _seen(_made_with(stored, type(config))), _seen(_tree(config))
    if before != now:
        fixed = next((key for key, _, _ in _fixed_changes(config, before, now)), None)
        if not resumed:
            there = f"continue that run with its own {fixed}" if fixed else "continue in this one"
            raise UserError(
                f"{folder.path}: made with another configuration ({_differences(before, now)}); name another folder "
                f"(logging.name=NEW, in Python out), {there} (--resume {folder.path}, in Python resume=True), or "
                "delete it"
            )
        if fixed:
            raise UserError(f"{fixed}: cannot change when {folder.path} is resumed; start a new run for that")
        moved = [key for key in PLACE if _at(before, key) != _at(now, key)]
        if moved and _place(now, folder).resolve() != folder.path.resolve():
            raise UserError(
                f"{' and '.join(moved)}: a resumed run goes on in its own folder, {folder.path}; leave the key out, or "
                "start a new run for that"
            )


def check_trained(config: RunConfig, folder: RunFolder, text: str, checkpoint: Path) -> None:
    """Refuse a config that was changed in the folder's file where a resumed run may not change.

    Args:
        config: of the run that goes on.
        folder: logs/<run>.
        text: what `config_text` gave in the training that wrote the checkpoint.
        checkpoint: the one to continue from.

    Raises:
        UserError: the key and both values.
    """
    if text == config_text(config):
        return
    then: Any = OmegaConf.to_container(OmegaConf.create(text))
    with suppress(UserError):  # keys that did not exist then get their defaults; others are compared as they are
        then = _tree(parse(type(config), then, ""))
    for key, old, new in _fixed_changes(config, _seen(then), _seen(_tree(config))):
        raise UserError(
            f"{key}: is {_short(new)} in {folder.path / 'config.yaml'}, but {checkpoint.name} was trained with "
            f"{_short(old)}; put that back, or start a new run for the change"
        )


def _fixed_changes(config: RunConfig, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of what a resume may not change."""
    sections = [field.name for field in dataclasses.fields(config) if field.name not in FREE]
    for key in (*sections, *FIXED):
        for changed, old, new in _changes(_at(before, key), _at(now, key), key):
            if not _may_move(changed, old, new):
                yield changed, old, new


def _may_move(key: str, old: Any, new: Any) -> bool:
    """Whether a key that differs names what may lie elsewhere now, or says what was unsaid.

    Of teacher.use_ema the run's pool knows more, and is compared as well.
    """
    if key in UNSAID:
        return old is None
    if key in IMAGES:
        return None not in (old, new)
    return key in POINTERS and IN_MEMORY not in f"{old} {new}"


def _place(tree: Any, folder: RunFolder) -> Path:
    """The run folder that a config names; one without a name has that of the folder."""
    return expanded(_at(tree, "logging.dir")) / (_at(tree, "logging.name") or folder.path.name)


def config_text(config: RunConfig) -> str:
    """A config as YAML; a batch size per device is left to the global one, since the devices may change."""
    return written(_tree(config))


def _tree(config: RunConfig) -> dict[str, Any]:
    """The plain values of `config_text`."""
    tree = plain_values(config)
    for name in SECTIONS:
        if name in tree and tree[name].get("global_batch_size") is not None:
            tree[name]["batch_size"] = None
    return tree


def _seen(tree: Any) -> Any:
    """What tells a config from another run's."""
    for key in (*UNSEEN, *ONE):
        section, _, name = key.rpartition(".")
        if (value := _at(tree, key)) is not None and (key in UNSEEN or value == 1):
            tree[section][name] = None
    return tree


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _differences(before: Any, now: Any) -> str:
    """The first keys that differ, with both values."""
    changes = list(_changes(before, now, ""))
    shown = [f"{key}: {_short(old)} there, {_short(new)} here" for key, old, new in changes[:NAMED]]
    more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    return "; ".join(shown) + more


def _changes(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of values that differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _changes(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif before != now:
        yield key, before, now


def _short(value: Any) -> str:
    return "null" if value is None else legible(str(value), 40)


def _made_with(stored: Path, schema: type[RunConfig]) -> Any:
    """The values of the config in a run folder; keys that did not exist when it was made have their defaults."""
    try:
        return _tree(load_config(stored, schema=schema, of_run=True))
    except UserError:  # a config of another script
        return OmegaConf.to_container(read_yaml(stored))  # refuses a damaged or endless one


def require_plain(path: Path) -> None:
    """Refuse a run folder whose name Lightning (fsspec) reads as a network address.

    Raises:
        UserError: the path holds `::`, or begins with `data:`.
    """
    text = str(path)
    mark = "::" if "::" in text else "data:" if text.startswith("data:") else None
    if mark:
        raise UserError(
            f"logging: {path}: a run folder cannot have {mark} in its path; change logging.dir or logging.name"
        )


def run_folder(log: LoggingConfig, default_name: str, schema: type[RunConfig]) -> RunFolder:
    """logs/<name>; the name is that of the --base files, joined by +, unless the config gives one.

    Raises:
        UserError: a name that no folder below logging.dir has.
    """
    name = log.name or default_name
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(name).parts):
        raise UserError(f"logging.name: '{legible(name, 40)}' is longer than the {LONGEST_NAME} bytes of a file's name")
    if Path(name).is_absolute() or name.startswith("~") or ".." in Path(name).parts or not Path(name).parts:
        raise UserError(f"logging.name: '{name}' must be a folder below {log.dir}; logging.dir says where that is")
    return RunFolder(Path(log.dir) / name, schema.MODEL)
