"""Sizes and other numbers that a graph computes with, kept as Python's own.

ONNX computes shapes with tensors: Shape, Gather, Concat, Reshape. Were they tensors here, a trace
could not see through them, and the batch size would become a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MOST_NUMBERS = 64
"""Integers in a row that still count as sizes or axes, not as data."""


class Numbers(NamedTuple):
    """A few numbers in the order of memory; each may be a size that a trace leaves open."""

    values: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def array(self) -> npt.NDArray[Any]:
        """The numbers as Python objects in an array, to be moved around by numpy."""
        array = np.empty(len(self.values), dtype=object)
        for index, value in enumerate(self.values):  # numpy would take sizes apart
            array[index] = value
        return array.reshape(self.shape)

    def to_tensor(self, device: torch.device | None = None) -> Tensor:
        values = [int(each) if isinstance(each, torch.SymInt) else each for each in self.values]
        return torch.tensor(values, device=device).reshape(self.shape)


Value: TypeAlias = Tensor | Numbers


def as_value(constant: Tensor) -> Value:
    """A constant as numbers where it can only be that: few integers in a row, or one number."""
    few = constant.numel() <= (1 if constant.is_floating_point() else MOST_NUMBERS)
    if constant.ndim > 1 or not few:
        return constant
    return Numbers(tuple(constant.reshape(-1).tolist()), tuple(constant.shape))


def one(value: Any) -> Numbers:
    return Numbers((value,), ())


def row(values: Iterable[Any]) -> Numbers:
    values = tuple(values)
    return Numbers(values, (len(values),))


def from_array(array: Any) -> Numbers:
    """What numpy made of `Numbers.array`; of a single number it makes that itself."""
    if not isinstance(array, np.ndarray):
        return one(array)
    return Numbers(tuple(array.reshape(-1)), array.shape)


def combine(function: Callable[..., Any], *operands: Numbers) -> Numbers:
    """A function of the numbers at each place, broadcast as tensors are."""
    arrays = np.broadcast_arrays(*(each.array for each in operands))
    values = tuple(function(*each) for each in zip(*(a.reshape(-1) for a in arrays), strict=True))
    return Numbers(values, arrays[0].shape)


def divide(a: Any, b: Any) -> Any:
    """As ONNX divides: integers towards zero."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return a // b  # sizes, so neither is below zero
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
