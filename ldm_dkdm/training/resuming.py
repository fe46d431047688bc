"""Find the checkpoint that a run continues from: the newest one that is whole."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from safetensors import SafetensorError
from torch import Tensor, distributed

from ldm_dkdm.checkpoints.hashes import ADVICE, check_file, hash_file, read_safetensors, verifying
from ldm_dkdm.checkpoints.pickles import QUESTION, asked_globals
from ldm_dkdm.checkpoints.pools import pool_files
from ldm_dkdm.checkpoints.reading import AGAIN
from ldm_dkdm.checkpoints.source import home_of
from ldm_dkdm.config.schema import FirstStageRun, TrainerConfig
from ldm_dkdm.errors import OutOfMemory, UserError, blaming, unreadable
from ldm_dkdm.files import sync
from ldm_dkdm.reporting import logger
from ldm_dkdm.reports.tables import read_cells
from ldm_dkdm.training.ends import EarlyEnd, TimeLimit, ends_of
from ldm_dkdm.training.run_folder import RunConfig, RunFolder, check_trained, checkpoints, config_text, step_of

KEYS = ("state_dict", "optimizer_states", "loops", "callbacks", "global_step")  # what a resume needs
SET_ASIDE = ".damaged"  # end of the name of a checkpoint that is not whole, once the run has gone on without it
WEIGHTS = ("state_dict", "current_model_state", "optimizer_states")  # parts whose numbers must be finite


class Choice(L.Callback):
    """The newest checkpoint that can be resumed; of damaged ones after it a warning says what is wrong.

    Of several processes each reads its own pool, and the first one reads what no other does. When the training starts,
    all must have chosen the same. Where one has found damage, the damaged checkpoint is set aside, so that the next
    start continues from the one before it.

    Args:
        folder: logs/<run>/checkpoints.
        pools: whether pools belong to a checkpoint, one for each rank that saved it.
        rank, ranks: this process, and the number of processes.
        config: that of the run, which goes into every checkpoint (`require_trained_alike`).

    Attributes:
        latest: the checkpoint; None without any.
        damage: what is wrong with the newest one, if it was passed over.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """

    def __init__(self, folder: Path, pools: bool, rank: int = 0, ranks: int = 1, config: Any = None) -> None:
        self.folder, self.damage = folder, ""
        self.config = "" if config is None else config_text(config)
        self.latest: Path | None = None
        found = checkpoints(folder)
        for checkpoint in reversed(found):
            try:
                require_whole(checkpoint, pools, rank, ranks)
            except OutOfMemory:  # says nothing of the checkpoint
                raise
            except UserError as error:
                self.damage = str(error).replace(ADVICE, "")  # a run has the checkpoint before it
            else:
                self.latest = checkpoint
                break
        if found and self.latest is None:
            raise UserError(f"{self.damage}; no earlier checkpoint is intact: {_how_to_begin(folder)}")
        if self.damage and self.latest:
            logger.warning(f"{self.damage}; continuing from {self.latest.name} in its place")

    def state_dict(self) -> dict[str, Any]:
        """What the run is trained with."""
        return {"config": self.config}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compare the choices of all processes, before any reads its checkpoint.

        Raises:
            UserError: they differ.
        """
        own = (step_of(self.latest) if self.latest else 0, self.damage)
        found: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(found, own)
        steps, damage = [step for step, _ in found], next((text for _, text in found if text), None)
        if len(set(steps)) == 1:
            return
        oldest = next((file for file in checkpoints(self.folder) if step_of(file) == min(steps)), None)
        if damage and oldest and trainer.is_global_zero:
            set_aside(self.folder, oldest)
        shown = ", ".join(f"rank {rank} from step {step}" for rank, step in enumerate(steps))
        raise UserError(
            f"{damage or f'{self.folder}: the processes see different checkpoints'}; the processes would continue from "
            f"different ones ({shown}); start the run again{f': it continues from step {min(steps)}' * bool(damage)}"
        )


def _how_to_begin(folder: Path) -> str:
    """What to do where no checkpoint in this folder can be resumed; without them a run's model is never replaced."""
    run = folder.parent
    model = home_of(run)
    if model == run:
        return f"delete {folder} to begin the run again"
    first_stage = model.name == FirstStageRun.MODEL  # `dkdm convert` takes diffusion models
    keep = f"a copy of {model}" if first_stage else f"`dkdm convert {run} OUT --to folder`"
    return (
        f"begin again under another name (--base {run}/config.yaml logging.name=NEW, in Python out); "
        f"{keep} keeps the weights of this run"
    )


def require_trained_alike(saved: Mapping[str, Any], config: RunConfig, folder: RunFolder, checkpoint: Path) -> None:
    """Refuse a config that is not the one that a checkpoint was trained with; older versions did not store it.

    Raises:
        UserError: as `check_trained`.
    """
    state = saved.get("callbacks", {}).get(Choice.__qualname__)
    text = state.get("config") if isinstance(state, Mapping) else None
    if isinstance(text, str) and text:
        check_trained(config, folder, text, checkpoint)


def require_whole(checkpoint: Path, pools: bool = False, rank: int = 0, ranks: int = 1) -> None:
    """Refuse a checkpoint that cannot be resumed, or whose content or pools are not what was written.

    Args:
        checkpoint: the file.
        pools: whether pools belong to it.
        rank, ranks: of several processes, the first one reads the checkpoint whole, and each reads its own pool.

    Raises:
        UserError: what is wrong with it.
    """
    with verifying(rank == 0):
        saved, step = read_checkpoint(checkpoint), step_of(checkpoint)
    missing = [name for name in KEYS if name not in saved]
    if missing or "fit_loop" not in saved["loops"]:
        raise UserError(
            f"{checkpoint}: cannot be resumed, it lacks {', '.join(missing) or 'the state of the training'}"
        )
    if saved["global_step"] != step:
        raise UserError(f"{checkpoint}: is the checkpoint of step {saved['global_step']}, not of step {step}")
    for name, tensor in _numbers({part: saved.get(part) for part in WEIGHTS} if rank == 0 else {}, ""):
        if not torch.isfinite(tensor).all():
            raise UserError(f"{checkpoint}: is damaged: {name} holds values that are not finite")
    saved_pools = pool_files(checkpoint.parent, checkpoint.stem) if pools else []
    for pool in saved_pools[rank : rank + 1] + (saved_pools[ranks:] if rank == 0 else []):
        with blaming(pool):
            try:
                read_safetensors(pool)
            except (OSError, SafetensorError) as error:
                raise unreadable(pool, f"cannot be read ({error})", error) from error


def _numbers(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of floating-point numbers in nested dictionaries and lists, with their dotted names."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield name, tree
        return
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield from _numbers(value, f"{name}.{key}" if name else str(key))


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint, mapped into memory; no code in it is run.

    Raises:
        UserError: the file is damaged.
    """
    fault = "is damaged"
    try:
        asked_globals(checkpoint)  # refuses what torch.load would unpickle for ever
    except OutOfMemory:
        raise
    except UserError as error:
        reason = str(error).removeprefix(f"{checkpoint}: ").replace(QUESTION, "").removesuffix(AGAIN)
        raise UserError(f"{checkpoint}: {fault}: {reason}") from error
    try:
        check_file(checkpoint)
        with blaming(checkpoint, fault):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:  # too short to be mapped
        raise unreadable(checkpoint, f"{fault} ({error})", error) from error
    if not isinstance(saved, dict):
        raise UserError(f"{checkpoint}: {fault}: it holds a {type(saved).__name__}")
    return saved


@dataclass(frozen=True)
class Begun:
    """What is done of a run that goes on: its checkpoint, the step of it, and its early ends with their states."""

    step: int = 0
    ends: Sequence[EarlyEnd] = ()
    latest: Path | None = None

    @classmethod
    def of(cls, folder: Path, config: TrainerConfig) -> Self:
        """What is done of the run with these checkpoints.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        latest = Choice(folder, pools=True).latest
        if latest is None:
            return cls()
        with verifying(False):  # `Choice` has compared it with its hash
            return cls(step_of(latest), ends_of(config, read_checkpoint(latest).get("callbacks", {})), latest)

    def end(self, max_steps: int) -> str | None:
        """The config key of the limit that the run has reached."""
        limits = ["trainer.max_steps"] if self.step >= max_steps else []
        return next(iter([*limits, *(end.key for end in self.ends if end.reached)]), None)

    @property
    def spent(self) -> float:
        """Seconds of its time limit that are used."""
        return sum(end.spent for end in self.ends if isinstance(end, TimeLimit))


def set_aside(folder: Path, latest: Path) -> None:
    """Rename the checkpoints after the one that a run continues from, so that they no longer count."""
    for damaged in [found for found in checkpoints(folder) if step_of(found) > step_of(latest)]:
        damaged.replace(damaged.with_name(damaged.name + SET_ASIDE))
        hash_file(damaged).unlink(missing_ok=True)  # else `sha256sum -c` misses the checkpoint
    sync(folder)


def continues(run: Path, step: int) -> str:
    """What a resume says: the step, and how many later ones are lost with a process that did not end by itself."""
    rows = read_cells(run / "metrics.csv", lambda problem: None)
    last = max((int(float(row["step"])) for row in rows), default=step)
    lost = f"; the steps after it are trained again ({last - step} at least)" if last > step else ""
    return f"{run}: continues from the checkpoint of step {step}{lost}"
