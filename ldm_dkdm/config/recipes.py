"""Find the configs and models that ship with the package."""

from pathlib import Path

from ldm_dkdm.config.hub import find_cached
from ldm_dkdm.errors import UserError, near
from ldm_dkdm.files import exists, expanded

PACKAGE = Path(__file__).parents[1]
SHIPPED = {"configs": "recipes", "models": "models"}  # folder in a checkout -> folder in the installed package


def shipped_folder(kind: str) -> Path:
    """Folder of the shipped `configs` or `models`: in the package, or beside it in a checkout."""
    installed = PACKAGE / SHIPPED[kind]
    return installed if installed.is_dir() else PACKAGE.parent / kind


def find_shipped(path: str | Path) -> Path:
    """Find a path such as `models/teachers/emoji64` among the shipped files, or a Hub id in the local cache.

    A path that exists here, or is found in neither, is returned as it is.
    """
    path = expanded(path)
    if path.is_absolute() or exists(str(path)) or path.parts[:1] not in [(kind,) for kind in SHIPPED]:
        return find_cached(path)
    shipped = shipped_folder(path.parts[0]).joinpath(*path.parts[1:])
    return shipped if shipped.exists() else path


def recipe_names() -> list[str]:
    """Names of the shipped configs, such as `ffhq256` and `students/cnn14m`."""
    root = shipped_folder("configs")
    return [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.rglob("*.yaml"))]


def find_config(name: str | Path) -> Path:
    """Find a config: an existing file, else a shipped recipe with or without `.yaml` and `students/`.

    Raises:
        UserError: there is neither; the message names the nearest recipe.
    """
    path, root = find_shipped(name), shipped_folder("configs")
    candidates = [path, *(root / part / f"{name}{suffix}" for part in ("", "students") for suffix in ("", ".yaml"))]
    found = next((candidate for candidate in candidates if exists(str(candidate)) and candidate.is_file()), path)
    if exists(str(found)):
        return found
    return _refuse(str(name))


def _refuse(name: str) -> Path:
    names = recipe_names()
    known = {word: full for full in names for word in (full, full.rpartition("/")[2])}
    close = near(Path(name).name.removesuffix(".yaml"), known, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"recipes: {', '.join(names)}"
    raise UserError(f"{name}: no such config file or recipe; {hint}")
