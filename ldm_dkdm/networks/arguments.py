"""Record a network's constructor arguments, so that a model can be written and rebuilt."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from torch import nn

Kind = TypeVar("Kind", bound=type[nn.Module])


def native(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's numbers and lists, also within mappings, lists and tuples."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: native(part) for key, part in value.items()}
    return type(value)(map(native, value)) if type(value) in (list, tuple) else value


def remembers_arguments(kind: Kind) -> Kind:
    """Class decorator: an instance keeps its constructor's arguments in `arguments`."""
    initialise, signature = kind.__init__, inspect.signature(kind)

    @functools.wraps(initialise)
    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = native(args), native(kwargs)
        initialise(self, *args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        self.arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    kind.__init__ = remember  # type: ignore[method-assign]  # what this decorator is for
    return kind
