"""Record a network's constructor arguments, so that a model can be written and rebuilt."""

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=type[nn.Module])


def remembers_arguments(kind: Kind) -> Kind:
    """Class decorator: an instance keeps its constructor's arguments in `arguments`."""
    initialise, signature = kind.__init__, inspect.signature(kind)

    @functools.wraps(initialise)
    def remember(self: Any, *args: object, **kwargs: object) -> None:
        initialise(self, *args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        self.arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    kind.__init__ = remember  # type: ignore[method-assign]  # what this decorator is for
    return kind
