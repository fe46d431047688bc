"""Name the file or override that holds a bad reference ${key}."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from ldm_dkdm.errors import UserError

UNWRITTEN = "names a key that no file or override sets; a reference takes no default, so write that key too"


def bad_reference(
    error: OmegaConfBaseException,
    overrides: Sequence[str],
    files: Sequence[Path] = (),
    parts: Sequence[DictConfig] = (),
) -> UserError:
    """What a user should hear of a config that cannot be merged or resolved.

    Args:
        error: OmegaConf's; it names the key whose value is at fault, if it knows.
        overrides, files: sources of the config; the overrides come last.
        parts: the content of each file.
    """
    place, text = error.full_key or "", str(error)
    own = next((item for item in reversed(overrides) if place and _sets(item, place)), None)
    holding = [str(file) for file, part in zip(files, parts, strict=False) if place and _holds(part, place)]
    source = own or next(reversed([*map(str, files[-1:]), *holding]), f"overrides {' '.join(overrides)}")
    if not (isinstance(error, InterpolationKeyError) and place):
        return UserError(f"{source}: {text}")
    name = text.partition("'")[2].partition("'")[0]
    return UserError(f"{place if own else f'{source}: {place}'}: ${{{name}}} {UNWRITTEN}")


def _sets(item: str, place: str) -> bool:
    """Whether an override sets a key, or the section or list that it is in."""
    key = item.partition("=")[0]
    return place == key or place.startswith((f"{key}.", f"{key}["))


def _holds(part: DictConfig, place: str) -> bool:
    """Whether a tree holds a key, whatever its value refers to."""
    node = OmegaConf.to_container(part, resolve=False)
    for name in place.replace("[", ".").replace("]", "").split("."):
        if isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict) and name in node:
            node = node[name]
        else:
            return False
    return True
