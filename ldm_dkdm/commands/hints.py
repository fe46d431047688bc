"""Hints of commands that open several models: bare ones for every model, scoped ones for one."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from typing import TYPE_CHECKING, Any

from ldm_dkdm.commands.arguments import HINTS, is_path, read_hints
from ldm_dkdm.config.schema import DiffusionConfig
from ldm_dkdm.errors import UserError

if TYPE_CHECKING:
    from ldm_dkdm.checkpoints import Hints
    from ldm_dkdm.model import DiffusionModel

FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".npz")  # endings that no value of a parameter has


DOTTED = re.compile(r"(?:teacher\.)?(?:params|diffusion)\.(?=\w+=)|first_stage\.(?:ckpt(?==)|(?=scale_factor=))")


def flat(item: str) -> str:
    """A hint as commands read it, where it is written as in a config, such as `teacher.params.KEY=VALUE`."""
    found = DOTTED.match(item)
    return item if found is None else ("first_stage" if found[0].endswith("ckpt") else "") + item[found.end() :]


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
            if dot and scope.isdecimal() and not scoped and "1" in scopes and "=" in rest:
                raise UserError(
                    f"{item}: no model has the number {scope}, -r names {len(scopes)}; write {rest} for every model"
                )
            found[scope if scoped else ""].append(flat(rest if scoped else item))
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
        """Refuse a hint that no opened model has used, such as a misspelt one; one without a value must have a name.

        Raises:
            UserError: the hint, and the models that describe themselves.
        """
        scoped = {f"{scope}.{name}": value for scope, own in self.own.items() for name, value in own.items()}
        given = {**self.bare, **scoped}
        used = {scope: model.hints.given for scope, model in models.items()}
        unused = [(name, list(models)) for name in self.bare if not any(name in names for names in used.values())]
        for scope, own in self.own.items():
            unused += [(f"{scope}.{name}", [scope]) for name in own if name not in used.get(scope, ())]
        for key, scopes in unused:
            value = given[key]
            if _is_needless(key.rpartition(".")[2], value, models.values()):
                continue
            if value is None:
                raise UserError(f"{key}: has no value, and is not the name of a hint; correct it, or leave it out")
            paths = ", ".join(str(models[scope].path) for scope in scopes if scope in models)
            why = f"{paths} describes itself" if paths else "the run's configuration describes this model"
            raise UserError(f"{key}: no model uses this hint ({why}); correct its name, or leave it out")


def _is_needless(name: str, value: Any, models: Iterable["DiffusionModel"]) -> bool:
    """Whether a hint asks for nothing: another code's default, or a name of a hint without a value."""
    from ldm_dkdm.checkpoints.hints import OWN_HINTS, STAGE_HINTS, is_needless

    if value is not None:
        return is_needless(name, value)
    known = {*OWN_HINTS, *STAGE_HINTS, *(field.name for field in fields(DiffusionConfig))}
    return name in known or any(name in signature(type(model.network)).parameters for model in models)


def split_paths(items: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths and hints; a missing file of weights or images, such as step=00000004.ckpt, is a path too."""
    paths = [item for item in items if is_path(item) or _is_missing_file(item)]
    return paths, [item for item in items if item not in paths]


def _is_missing_file(item: str) -> bool:
    key = item.partition("=")[0].rpartition(".")[2]
    return item.endswith(FILES) and key not in HINTS
