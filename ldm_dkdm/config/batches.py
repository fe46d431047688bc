"""Batch sizes: a global one is divided over devices and accumulated batches."""

from collections.abc import Mapping
from math import prod
from typing import Any

from ldm_dkdm.device import world_of
from ldm_dkdm.errors import UserError

SECTIONS = ("distill", "data")  # with a batch size


def divided(section: Mapping[str, Any], trainer: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A section whose `batch_size` per device follows from its `global_batch_size`, where only that is given.

    Args:
        section: of a configuration, as plain values.
        trainer: the section with `devices`, `num_nodes` and `accumulate`.
        where: prefix of the key in a message.

    Raises:
        UserError: the devices do not divide it, or both are given and differ.
    """
    total, given = section.get("global_batch_size"), section.get("batch_size")
    asked = [trainer.get(key) for key in ("devices", "num_nodes")]
    accumulate = trainer.get("accumulate", 1)
    if total is None or not all(isinstance(n, int) and n > 0 for n in (total, accumulate, *filter(_given, asked))):
        return dict(section)
    parts = [prod(world_of(*asked)), accumulate]
    size, rest = divmod(total, parts[0] * parts[1])
    if rest:
        raise UserError(f"{where}global_batch_size: {total} is not a multiple of {parts[0]} devices x {parts[1]}")
    if given not in (None, size):
        raise UserError(f"{where}global_batch_size: {total} means batch_size {size}, not {given}; give one of them")
    return {**section, "batch_size": size}


def _given(value: Any) -> bool:
    return value is not None
