"""Read the training checkpoint of a run: EMA and raw weights, described by the run's model folder."""

from pathlib import Path

from ldm_dkdm.checkpoints import model_folder
from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.shapes import under
from ldm_dkdm.checkpoints.source import Source, has_config, home_of
from ldm_dkdm.checkpoints.state_dicts import DIT, RAW, UNET, Weights
from ldm_dkdm.checkpoints.writing import SavedModel
from ldm_dkdm.errors import UserError

NAME = "training checkpoint"
PREFIX = "network."  # name of the network in the Lightning module


def recognises(source: Source) -> bool:
    """Whether a file is a run's checkpoint; another training's network may also be called so."""
    if source.kind != "torch" or not any(name.startswith(PREFIX) for name in source.tensors):
        return False
    known = any(source.weights(names) != Weights() for names in (UNET, DIT))
    return not known or _home(source) is not None


def read(source: Source) -> Contents:
    """The weights in the checkpoint and the description in the run's model folder.

    Raises:
        UserError: no model folder beside it.
    """
    home = _home(source)
    if home is None:
        raise UserError(
            f"{source.path}: is a run's checkpoint, but no model folder beside it says what its weights are; keep it "
            "in the run's checkpoints/, or name the run"
        )
    raw = under(source.part(RAW), PREFIX) if RAW in source.content else None
    return model_folder.described(home, file=source.path, format=NAME, ema=under(source.tensors, PREFIX), raw=raw)


def _home(source: Source) -> Path | None:
    """The model folder of the run, which describes the weights."""
    run = source.path.parent.parent
    home = home_of(run)
    return home if home != run and has_config(home) else None


def write(model: SavedModel, path: Path) -> None:
    """Refuse: a checkpoint also holds the optimizer and the pool.

    Raises:
        UserError: always.
    """
    raise UserError("format: only a run writes its checkpoints; choose folder or safetensors")
