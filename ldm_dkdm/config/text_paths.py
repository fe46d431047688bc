"""Paths in configurations, where no shell replaces `~` and `$HOME`."""

import re

from ldm_dkdm.errors import UserError
from ldm_dkdm.files import exists, expanded

VARIABLE = re.compile(r"(^|/)\$\w")  # a shell's


def path_of(text: str, key: str) -> str:
    """A path with `~` and `~user` replaced by the home folder.

    Raises:
        UserError: a variable of the shell, or a user who does not exist; `key` is named. What exists by that name is
            meant.
    """
    path = str(expanded(text)) if text.startswith("~") else text
    if (path.startswith("~") or VARIABLE.search(path)) and not exists(path):
        what = "this user does not exist" if path.startswith("~") else "variables of a shell are not replaced here"
        raise UserError(f"{key}: {text}: {what}; write ${{oc.env:HOME}}, or the path itself")
    return path
