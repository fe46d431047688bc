"""Read NumPy arrays from pickles without NumPy's constructors, which can be made to follow a file's pointers."""

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class PickledType:
    """Stand-in for `numpy.dtype`: a numeric type in a byte order, nothing else."""

    def __init__(self, code: object = None, *flags: object) -> None:
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, which is not a numeric type")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds numbers in the byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])

    def numbers(self, content: bytes | bytearray) -> np.ndarray:
        """Decode bytes to numbers (N,)."""
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError(f"it holds an array made of {type(content).__name__}")
        numbers = np.frombuffer(content, self.dtype)
        return numbers.astype(self.dtype.newbyteorder("="), copy=False)


class PickledArray:
    """Stand-in for `numpy.ndarray`."""

    def __init__(self, *ignored: object) -> None:
        self._array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, PickledType):
            raise pickle.UnpicklingError("it holds an array without a numeric type")
        self._array = kind.numbers(content).reshape(shape, order="F" if fortran else "C")

    @property
    def tensor(self) -> Tensor:
        """The array as a tensor.

        Raises:
            ValueError: the pickle never filled the array.
        """
        if self._array is None:
            raise ValueError("an array without content")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the array is read-only, but its bytes are not shared
            return torch.from_numpy(self._array)


def _empty_array(*ignored: object) -> PickledArray:
    """`numpy.core.multiarray._reconstruct`: the content follows."""
    return PickledArray()


def _array_of(content: bytes, kind: PickledType, shape: tuple[int, ...], order: str) -> PickledArray:
    """`numpy.core.numeric._frombuffer`, of pickle protocol 5."""
    array = PickledArray()
    array.__setstate__((1, shape, kind, order == "F", content))
    return array


def _scalar(kind: PickledType, content: bytes) -> float:
    """`numpy.core.multiarray.scalar`."""
    (number,) = kind.numbers(content)
    return number.item()


CORE = ("numpy.core", "numpy._core")
STAND_INS: dict[str, Callable[..., object]] = {"numpy.ndarray": PickledArray, "numpy.dtype": PickledType}
STAND_INS |= {f"{core}.multiarray._reconstruct": _empty_array for core in CORE}
STAND_INS |= {f"{core}.multiarray.scalar": _scalar for core in CORE}
STAND_INS |= {f"{core}.numeric._frombuffer": _array_of for core in CORE}
