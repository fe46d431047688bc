"""Write figures as JSON that every reader takes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_dkdm.files import write_text


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree atomically; numbers that are not finite, which JSON lacks and older versions wrote, are left out."""
    write_text(path, json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n")


def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _finite(value) for name, value in tree.items() if _is_json(value)}
    return [_finite(value) for value in tree if _is_json(value)] if isinstance(tree, list | tuple) else tree


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
