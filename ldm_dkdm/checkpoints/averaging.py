"""Whether the weights of a model are an average (EMA) or raw, as a fact that travels with the model."""

from ldm_dkdm.checkpoints.contents import Contents
from ldm_dkdm.checkpoints.ema_names import said_of_file
from ldm_dkdm.checkpoints.hints import Hints

KIND = "weights_kind"  # the fact in a model's info and in its card
UNSAID = "the only set in the file, which does not say EMA or raw"


def weights_kind(contents: Contents, hints: Hints) -> str | None:
    """Whether `contents.weights` are EMA or raw; None where the file holds one set and does not say.

    Cards of runs say it. Those of older versions name the EMA's decay; files of others say it in their names, as
    guided-diffusion's ema_* and diffusers' *.non_ema.*.
    """
    if contents.ema is not None:
        return "raw" if contents.wants_ema(hints) is False else "EMA"
    said: str | None = contents.info.get(KIND)
    if said or "ema_decay" in contents.info:
        return said or "EMA"
    named = said_of_file(contents.file)
    if named is None:
        return "raw" if hints.use_ema is False else None
    return "EMA" if named else "raw"
