"""What names of files, and of parts of a file, say of weights: averaged (EMA), not averaged, or neither."""

import re
from pathlib import Path

# Words of a name: model_ema, modelEMA, EMAModel, UNetEMA; digits are words, so that `no_3_ema` is not `no ema`.
WORD = re.compile(r"EMA(?=U?[A-Z][a-z]|[^A-Z]|$)|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# words that are written together with ema: emaonly, netema
OTHER = "denoiser|dict|diffusion|dit|helper|model|net|network|only|params|state|unet|weights|wrapper"
AVERAGED = rf"(?:{OTHER})?emas?(?:{OTHER})*|(?:averag(?:e|ed|es|ing)|avg|polyak|shadows?|swa)(?:{OTHER})?"
NEGATIONS = "no|non|not|without|wo"
ONLINE = "online"  # lucidrains' name of the raw weights within its EMA
STEP = re.compile(r"(?P<kind>model|ema_[\d.]+_)(?P<step>\d+)")  # guided-diffusion's files of one step
FOLDER = "unet_ema"  # folder of the EMA in a diffusers trainer's checkpoint-N; the file's own name does not say it


def said_of(name: str) -> bool | None:
    """True where the words of a name say averaged weights, False where they say that these are not; None: neither."""
    words = [word.lower() for word in WORD.findall(name)]
    averaged = [index for index, word in enumerate(words) if re.fullmatch(AVERAGED, word)]
    negated = any(index and re.fullmatch(NEGATIONS, words[index - 1]) for index in averaged)
    if negated or any(re.fullmatch(rf"(?:{NEGATIONS})(?:{AVERAGED})", word) for word in words):
        return False
    return True if averaged and ONLINE not in words else None


def is_averaged(name: str) -> bool:
    """Whether the words of a name, or of a dotted place in a file, say that its weights are averaged."""
    return said_of(name) is True


def said_of_file(file: Path) -> bool | None:
    """The same of a weights file, by its name without the ending."""
    said = said_of(file.stem)
    return True if said is None and file.parent.name == FOLDER else said


def other_kind_beside(file: Path) -> Path | None:
    """The raw weights (modelNNNNNN.pt) beside guided-diffusion's EMA of a step, or the EMA beside the raw ones."""
    own = STEP.fullmatch(file.stem)
    if own is None:
        return None
    others = ((path, STEP.fullmatch(path.stem)) for path in sorted(file.parent.glob(f"*{own['step']}{file.suffix}")))
    found = (path for path, one in others if one and one["step"] == own["step"])
    return next((path for path in found if path.stem.startswith("ema") != file.stem.startswith("ema")), None)
