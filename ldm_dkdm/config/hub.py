"""Find models of the Hugging Face Hub in its local cache; nothing is downloaded."""

import os
import re
from pathlib import Path

from ldm_dkdm.files import exists

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")  # OWNER/NAME
OURS = ("logs", "models", "configs")  # first folders of paths that are never ids


def is_hub_id(path: Path) -> bool:
    """Whether a path that does not exist may be a Hub id, OWNER/NAME."""
    known = path.parts[:1] and path.parts[0] in OURS
    return not known and HUB_ID.fullmatch(str(path)) is not None and not exists(str(path))


def cache_folder() -> Path:
    """The Hub's cache: HF_HUB_CACHE, else `hub` in HF_HOME, else the usual one."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "hub"


def find_cached(path: Path) -> Path:
    """The newest cached snapshot of a Hub id, that of `main` first; any other path as it is."""
    if not is_hub_id(path):
        return path
    home = cache_folder() / f"models--{str(path).replace('/', '--')}"
    main = home / "refs" / "main"
    snapshots = sorted(home.glob("snapshots/*"), key=lambda found: found.stat().st_mtime, reverse=True)
    named = [home / "snapshots" / main.read_text().strip()] if main.is_file() else []
    return next((found for found in [*named, *snapshots] if found.is_dir()), path)
