"""Check a first stage's `ddconfig` before taming's classes build it: they ignore keys that they do not know."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_dkdm.errors import UserError, nearest, pick

ATTENTIONS = {"vanilla": "softmax", "none": None}  # CompVis's `attn_type` -> what the middle computes
GROUPS = 32  # groups of taming's GroupNorm
SIDE = 16384  # largest image
LEVELS = 12
# whole numbers: key -> largest value; files are not trusted
WHOLE = {"ch": 4096, "out_ch": 64, "in_channels": 64, "num_res_blocks": 100, "resolution": SIDE, "z_channels": 1024}
FLAGS = ("double_z", "resamp_with_conv")
# keys of CompVis's classes that are not read, and the value at which they change nothing
UNREAD = {"give_pre_end": False, "tanh_out": False, "use_linear_attn": False, "use_timestep": False}
KNOWN = (*WHOLE, "ch_mult", "attn_resolutions", "dropout", *FLAGS, "attn_type")
NEEDED = (*WHOLE, "ch_mult", "attn_resolutions")


def read_keys(ddconfig: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `ddconfig` that are read, checked.

    Raises:
        UserError: a key that is unknown or missing, or a value that no autoencoder has; begins with `ddconfig.`.
    """
    for key, value in ddconfig.items():
        if key in UNREAD and value != UNREAD[key]:
            raise UserError(f"ddconfig.{key}: {value!r} is not supported, only {UNREAD[key]!r}")
        if key not in KNOWN and key not in UNREAD:
            raise UserError(f"ddconfig.{key}: unknown key{nearest(str(key), KNOWN)}")
    for key in NEEDED:
        if key not in ddconfig:
            raise UserError(f"ddconfig.{key}: missing")
    found = {key: value for key, value in ddconfig.items() if key in KNOWN}
    for key, most in WHOLE.items():
        require_whole(f"ddconfig.{key}", found[key], most)
    for key in FLAGS:
        if not isinstance(found.get(key, True), bool):
            raise UserError(f"ddconfig.{key}: expected true or false, got {found[key]!r}")
    pick(ATTENTIONS, found.get("attn_type", "vanilla"), "ddconfig.attn_type")
    _require_levels(found["ch"], found["ch_mult"], found["resolution"])
    _require_rows("attn_resolutions", found["attn_resolutions"], SIDE)
    dropout = found.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"ddconfig.dropout: expected a number from 0 to below 1, got {dropout!r}")
    return found


def require_whole(name: str, value: object, most: int) -> None:
    """Refuse anything but a whole number from 1 to `most`.

    Raises:
        UserError: begins with `name`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(f"{name}: expected a whole number from 1 to {most}, got {value!r}")


def _require_rows(key: str, values: object, most: int) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) > LEVELS:
        raise UserError(f"ddconfig.{key}: expected a list of at most {LEVELS} whole numbers, got {values!r}")
    for i, value in enumerate(values):
        require_whole(f"ddconfig.{key}[{i}]", value, most)


def _require_levels(channels: int, mults: Any, resolution: int) -> None:
    _require_rows("ch_mult", mults, 64)
    if not mults:
        raise UserError("ddconfig.ch_mult: expected one entry per level, got an empty list")
    if resolution % 2 ** (len(mults) - 1):
        raise UserError(f"ddconfig.ch_mult: {len(mults)} levels cannot halve resolution {resolution} that often")
    for mult in (1, *mults):
        if channels * mult % GROUPS:
            raise UserError(f"ddconfig.ch: {channels * mult} channels are no multiple of {GROUPS} (GroupNorm)")
