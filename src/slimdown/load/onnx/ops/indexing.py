"""Operators that look values up: slices, rows, places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimdown.load.onnx.call import Call, normal_axis
from slimdown.load.onnx.numbers import Numbers, Value, from_array


def gather(call: Call) -> Value:
    value, index = call.value(0), call.value(1)
    axis = call.attribute("axis", 0)
    if isinstance(value, Numbers) and isinstance(index, Numbers):
        places = np.array(index.values, dtype=int).reshape(index.shape)
        return from_array(value.array.take(places, axis))
    x = call.tensor(0)
    axis = normal_axis(axis, x.ndim)
    if isinstance(index, Numbers):
        return _gather_numbers(x, axis, index)
    return x[(slice(None),) * axis + (index.long(),)]


def _gather_numbers(x: Tensor, axis: int, index: Numbers) -> Tensor:
    if index.shape == ():
        return x.select(axis, index.values[0])
    places = [normal_axis(place, x.shape[axis]) for place in index.values]
    first = places[0]
    if places == list(range(first, first + len(places))):
        return x.narrow(axis, first, len(places))
    return x.index_select(axis, torch.tensor(places, device=x.device))


def gather_elements(call: Call) -> Value:
    x, index = call.tensor(0), call.tensor(1).long()
    axis = normal_axis(call.attribute("axis", 0), x.ndim)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def gather_nd(call: Call) -> Value:
    call.require("batch_dims", 0)
    return call.tensor(0)[tuple(call.tensor(1).long().unbind(-1))]


def scatter_nd(call: Call) -> Value:
    call.require("reduction", "none")
    x, index, updates = call.tensor(0), call.tensor(1).long(), call.tensor(2)
    return x.index_put(tuple(index.unbind(-1)), updates.to(x.dtype))


def slice_(call: Call) -> Value:
    value = call.value(0)
    starts, ends = call.numbers(1), call.numbers(2)
    axes = call.numbers(3) if call.has(3) else list(range(len(starts)))
    steps = call.numbers(4) if call.has(4) else [1] * len(starts)
    cuts = list(zip(starts, ends, axes, steps, strict=True))
    if isinstance(value, Numbers):
        array = value.array
        for start, end, axis, step in cuts:
            place = (slice(None),) * normal_axis(axis, array.ndim)
            array = array[(*place, _python_slice(start, end, step))]
        return from_array(array)
    for start, end, axis, step in cuts:
        value = _cut(value, start, end, normal_axis(axis, value.ndim), step)
    return value


def _python_slice(start: int, end: int, step: int) -> slice:
    # Below zero, ONNX's "before the first" is a very small number.
    return slice(start, None if step < 0 and end < -(2**30) else end, step)


def _cut(x: Tensor, start: Any, end: Any, axis: int, step: int) -> Tensor:
    if step < 0:
        places = range(x.shape[axis])[_python_slice(start, end, step)]
        return x.index_select(axis, torch.tensor(list(places), device=x.device))
    return x[(slice(None),) * axis + (slice(start, end, step),)]


def trilu(call: Call) -> Value:
    diagonal = call.operand(1) if call.has(1) else 0
    function = torch.triu if call.attribute("upper", 1) else torch.tril
    return function(call.tensor(0), diagonal)


TABLE: dict[str, Callable[[Call], Any]] = {
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterND": scatter_nd,
    "Slice": slice_,
    "Trilu": trilu,
}
