"""Sizes and other numbers that a graph computes with, kept as Python's own.

ONNX computes shapes with tensors: Shape, Gather, Concat, Reshape. Were they tensors here, a trace
could not see through them, and the batch size would become a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

MOST_NUMBERS = 64
"""Integers in a row that still count as sizes or axes, not as data."""


class Numbers(NamedTuple):
    """A row of numbers, or one alone; each may be a size that a trace leaves open."""

    values: tuple[Any, ...]
    is_scalar: bool = False

    @property
    def ndim(self) -> int:
        return 0 if self.is_scalar else 1

    def to_tensor(self, device: torch.device | None = None) -> Tensor:
        tensor = torch.tensor([_plain(value) for value in self.values], device=device)
        return tensor.reshape(()) if self.is_scalar else tensor


Value: TypeAlias = Tensor | Numbers


def as_value(constant: Tensor) -> Value:
    """A constant as numbers where it can only be that: few integers in a row, or one number."""
    few = constant.numel() <= (1 if constant.is_floating_point() else MOST_NUMBERS)
    if constant.ndim > 1 or not few:
        return constant
    return Numbers(tuple(constant.reshape(-1).tolist()), constant.ndim == 0)


def one(value: Any) -> Numbers:
    return Numbers((value,), True)


def row(values: Iterable[Any]) -> Numbers:
    return Numbers(tuple(values))


def apply(function: Callable[[Any], Any], numbers: Numbers) -> Numbers:
    """A function of each number."""
    return Numbers(tuple(function(value) for value in numbers.values), numbers.is_scalar)


def combine(function: Callable[..., Any], *operands: Numbers) -> Numbers:
    """A function of the numbers at each place, one number fitting any row."""
    length = max((len(each.values) for each in operands), key=lambda size: (size != 1, size))
    rows = [each.values * length if len(each.values) == 1 else each.values for each in operands]
    is_scalar = all(each.is_scalar for each in operands)
    return Numbers(tuple(function(*each) for each in zip(*rows, strict=True)), is_scalar)


def divide(a: Any, b: Any) -> Any:
    """As ONNX divides: integers towards zero."""
    if isinstance(a, float | torch.SymFloat) or isinstance(b, float | torch.SymFloat):
        return a / b
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return a // b  # sizes, so neither is below zero
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, torch.SymInt) else value
