"""Batch sizes: a global one is divided over devices and accumulated batches."""

from collections.abc import Mapping
from typing import Any

from ldm_dkdm.errors import UserError

SECTIONS = ("distill", "data")  # with a batch size


def divided(section: Mapping[str, Any], trainer: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A section whose `batch_size` per device follows from its `global_batch_size`, where only that is given.

    Args:
        section: of a configuration, as plain values.
        trainer: the section with `devices` and `accumulate`.
        where: prefix of the key in a message.

    Raises:
        UserError: the devices do not divide it, or both are given and differ.
    """
    total, given = section.get("global_batch_size"), section.get("batch_size")
    parts = [trainer.get(key, 1) for key in ("devices", "accumulate")]
    if total is None or not all(isinstance(value, int) and value > 0 for value in (total, *parts)):
        return dict(section)
    size, rest = divmod(total, parts[0] * parts[1])
    if rest:
        raise UserError(f"{where}global_batch_size: {total} is not a multiple of {parts[0]} devices x {parts[1]}")
    if given not in (None, size):
        raise UserError(f"{where}global_batch_size: {total} means batch_size {size}, not {given}; give one of them")
    return {**section, "batch_size": size}
