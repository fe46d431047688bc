"""Whether the weights of a model are an average (EMA) or raw, as a fact that travels with the model."""

from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.hints import Hints
from ldm_dkdm.checkpoints.state_dicts import is_averaged

KIND = "weights_kind"  # the fact in a model's info and in its card
UNSAID = "the only set in the file, which does not say EMA or raw"


def weights_kind(contents: Contents, hints: Hints) -> str | None:
    """Whether `contents.weights` are EMA or raw; None where the file holds one set and does not say.

    Cards of runs say it. Those of older versions name the EMA's decay; guided-diffusion's files are called ema_*.
    """
    if contents.ema is not None:
        return "raw" if contents.wants_ema(hints) is False else "EMA"
    said: str | None = contents.info.get(KIND)
    averaged = "ema_decay" in contents.info or is_averaged(contents.file.stem)
    return said or ("EMA" if averaged else "raw" if hints.use_ema is False else None)
