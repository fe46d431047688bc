"""Read the training checkpoint of a run: EMA and raw weights, described by the run's model folder."""

from pathlib import Path

from ldm_dkdm.checkpoints import folder
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.shapes import under
from ldm_dkdm.checkpoints.source import Source, has_config, home_of
from ldm_dkdm.checkpoints.writing import SavedModel
from ldm_dkdm.errors import UserError

NAME = "training checkpoint"
PREFIX = "network."  # name of the network in the Lightning module
RAW = "current_model_state"  # Lightning's key of the weights without averaging


def recognises(source: Source) -> bool:
    """Whether a file is a run's checkpoint."""
    return source.kind == "torch" and any(name.startswith(PREFIX) for name in source.tensors)


def read(source: Source) -> Contents:
    """The weights in the checkpoint and the description in the run's model folder.

    Raises:
        UserError: no model folder beside it.
    """
    run = source.path.parent.parent
    home = home_of(run)
    if home == run or not has_config(home):
        raise UserError(
            f"{source.path}: is a run's checkpoint, but no model folder beside it says what its weights are; keep it "
            "in the run's checkpoints/, or name the run"
        )
    raw = under(source.part(RAW), PREFIX) if RAW in source.content else None
    return folder.described(home, file=source.path, format=NAME, ema=under(source.tensors, PREFIX), raw=raw)


def write(model: SavedModel, path: Path) -> None:
    """Refuse: a checkpoint also holds the optimizer and the pool.

    Raises:
        UserError: always.
    """
    raise UserError("format: only a run writes its checkpoints; choose folder or safetensors")
