"""Keys of the configs of diffusers' networks."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldm_dkdm.errors import UserError, nearest


def require_known(config: Mapping[str, Any], known: Collection[str], source: Path) -> None:
    """Refuse keys of a network's config that its class does not have: the weights may be of another class.

    Raises:
        UserError: names the file and the key.
    """
    for key in sorted(set(config) - set(known)):
        if not key.startswith("_"):
            advice = nearest(key, known) or "; remove it"
            raise UserError(f"{source}: {key}: not a key of diffusers' {config['_class_name']}{advice}")


def side_of(size: object, source: Path) -> int:
    """The side of square states: a number, or the same number twice.

    Raises:
        UserError: it is absent, or they are not square.
    """
    sides = set(size) if isinstance(size, list) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int):
        raise UserError(f"{source}: sample_size: {size!r} is not the side of square states")
    return side
