"""The parser of all commands: one line per mistake, hints among the values of a flag, no flag given as two values."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ldm_dkdm.commands.other_flags import advice
from ldm_dkdm.errors import UserError
from ldm_dkdm.files import exists
from ldm_dkdm.reporting import logger


class Once(argparse._StoreAction):
    """Store a value; a flag that is given again with another one is refused."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Store the value of a flag or a positional argument.

        Raises:
            UserError: the flag has another value already.
        """
        if option_string is not None and isinstance(parser, Parser):
            before = parser.stored.setdefault(self.dest, values)
            if before is not values and before != values:  # NaN is not equal to itself
                name = "/".join(self.option_strings)
                raise UserError(f"{name}: given as {before} and as {values}; give it once")
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line; options may stand between positional arguments, and `key=value` anywhere."""

    hint = "see --help"
    given: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stored: dict[str, Any] = {}  # values of flags so far
        self.passed: list[str] = []  # key=value among the values of a flag
        for name in (None, "store"):
            self.register("action", name, Once)

    def parse_args(  # type: ignore[override]  # argparse also takes namespaces of other classes
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line with `key=value` before or after options."""
        self.given = list(sys.argv[1:] if args is None else args)
        self.stored, self.passed = {}, []
        options = self.parse_intermixed_args(args, namespace)
        items = next((own for own in ("hints", "overrides") if hasattr(options, own)), None)
        if items is not None:
            getattr(options, items).extend(self.passed)
            self._gather(options, items)
            self._require_single(getattr(options, items))
            _mention_repeated([*getattr(options, "base", []), *getattr(options, items)])
        if getattr(options, "stage", None) is not None and items is not None:
            key = "first_stage" if items == "hints" else "first_stage.ckpt"
            for item in [*getattr(options, items), *getattr(options, "base", [])]:
                name, _, value = item.partition("=")
                if name == key and value != options.stage:
                    raise UserError(f"--first_stage: {options.stage}, and {item}; give one of them")
            getattr(options, items).append(f"{key}={options.stage}")
        return options

    def _gather(self, options: argparse.Namespace, items: str) -> None:
        """Move `key=value` among the models of -r to the other ones, in the order of the command line."""
        models, others = getattr(options, "resume", None), getattr(options, items)
        if not isinstance(models, list):
            return
        options.resume = [item for item in models if "=" not in item or exists(item)]
        moved = [item for item in models if item not in options.resume]
        paths = [item for item in others if "=" not in item or exists(item)]
        hints = {*moved, *others}.difference(paths)
        setattr(options, items, [*paths, *(item for item in self.given if item in hints)])

    def _require_single(self, others: Sequence[str]) -> None:
        """Refuse a second number after a flag that takes one: it would be taken for a path."""
        for item in (item for item in others if _is_number(item) and not exists(item)):
            for place in (i for i, word in enumerate(self.given) if word == item and i):
                flag, equals, value = self.given[place - 1].partition("=")
                if not equals:
                    flag, value = self.given[max(place - 2, 0)], flag
                action = self._option_string_actions.get(flag)
                if action is not None and action.nargs is None and _is_number(value):
                    raise UserError(f"{flag}: takes one value, got {value} and {item}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The values of an option without the `key=value` that follow them: no number and no choice has a =."""
        if action.option_strings and action.nargs in ("+", "?") and (action.type or action.choices):
            hints = [item for item in arg_strings if "=" in item]
            values = [item for item in arg_strings if "=" not in item]
            if action.nargs == "+" and not values:
                raise UserError(f"{action.option_strings[-1]}: give at least one value before {hints[0]}")
            self.passed += hints
            arg_strings = values
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` in place of printing the usage; options of other codes are named with ours."""
        if line := advice(self.given, set(self._option_string_actions)):
            raise UserError(line)
        raise UserError(f"{message}; {self.hint}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mention_repeated(items: Sequence[str]) -> None:
    """Name the keys that are given with several values, of which the last one counts, as of several --base files."""
    given: dict[str, str] = {}
    for item in (item for item in items if not exists(item)):  # a path may hold a =
        key, equals, value = item.partition("=")
        if equals and given.get(key, value) != value:
            logger.warning(f"{key}: given as {given[key]} and as {value}; the last one counts")
        given[key] = value
