"""Hints of commands that open several models: bare ones for every model, scoped ones for one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm_dkdm.commands.arguments import HINTS, is_path, read_hints
from ldm_dkdm.errors import UserError

if TYPE_CHECKING:
    from ldm_dkdm.checkpoints import Hints
    from ldm_dkdm.model import DiffusionModel

FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".npz")  # endings that no value of a parameter has


class ScopedHints:
    """`key=value` items for several models: `num_heads=4` for every model that needs it, `teacher.num_heads=4` for one.

    Args:
        items: the command line's.
        scopes: a name for each model.
        flags: bare hints that were given as flags; those of None are not given.

    Raises:
        UserError: an item that is not key=value, or a hint that a flag contradicts.
    """

    def __init__(self, items: Sequence[str], scopes: Sequence[str], flags: Mapping[str, Any] | None = None) -> None:
        found: dict[str, list[str]] = {scope: [] for scope in ("", *scopes)}
        for item in items:
            scope, dot, rest = item.partition(".")
            scoped = dot and scope in scopes
            found[scope if scoped else ""].append(rest if scoped else item)
        given = {scope: read_hints(own) for scope, own in found.items()}
        flagged = {name: value for name, value in (flags or {}).items() if value is not None}
        self.bare = given.pop("")
        for name, value in flagged.items():
            if self.bare.get(name, value) != value:
                raise UserError(f"{name}: {self.bare[name]} as a hint, but --raw says {value}; give one of them")
        self.bare |= flagged
        self.own = given

    def of(self, scope: str) -> "Hints":
        """The hints for one model.

        Raises:
            UserError: a bad value.
        """
        from ldm_dkdm.checkpoints import Hints

        return Hints.of(**{**self.bare, **self.own[scope]})

    def require_used(self, models: Mapping[str, "DiffusionModel"]) -> None:
        """Refuse a hint that no opened model has used, such as a misspelt one.

        Raises:
            UserError: the hint, and the models that describe themselves.
        """
        used = {scope: model.hints.given for scope, model in models.items()}
        unused = [(name, list(models)) for name in self.bare if not any(name in names for names in used.values())]
        for scope, own in self.own.items():
            unused += [(f"{scope}.{name}", [scope]) for name in own if name not in used.get(scope, ())]
        for key, scopes in unused:
            paths = ", ".join(str(models[scope].path) for scope in scopes if scope in models)
            why = f"{paths} describes itself" if paths else "the run's configuration describes this model"
            raise UserError(f"{key}: no model uses this hint ({why}); correct its name, or leave it out")


def split_paths(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths and hints; a missing file of weights or images, such as step=00000004.ckpt, is a path too."""
    paths = [item for item in items if is_path(item) or _is_missing_file(item)]
    return paths, [item for item in items if item not in paths]


def _is_missing_file(item: str) -> bool:
    key = item.partition("=")[0].rpartition(".")[2]
    return item.endswith(FILES) and key not in HINTS
