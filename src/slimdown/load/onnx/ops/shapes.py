"""Operators that tell, change or fill shapes: the values stay, or are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slimdown.load.onnx.call import Call, Unsupported, normal_axis
from slimdown.load.onnx.numbers import MOST_NUMBERS, Numbers, Value, as_value, from_array, one, row

MOST_FILLED = 2**28
"""Numbers in a tensor that an operator makes of nothing: 1 GB."""


def shape(call: Call) -> Value:
    value = call.value(0)
    return row(value.shape[call.attribute("start", 0) : call.attribute("end", None)])


def size(call: Call) -> Value:
    value = call.value(0)
    return one(len(value.values) if isinstance(value, Numbers) else value.numel())


def reshape(call: Call) -> Value:
    value, sizes = call.value(0), call.numbers(1)
    if isinstance(value, Numbers):
        return from_array(value.array.reshape(sizes))
    return value.reshape(resolve(sizes, value, keeps_zero=call.attribute("allowzero", 0)))


def resolve(sizes: list[Any], x: Tensor, *, keeps_zero: bool = False) -> list[Any]:
    """The sizes that Reshape asks for; 0 stands for that of the input."""
    if keeps_zero:
        return sizes
    return [
        x.shape[axis] if isinstance(size, int) and size == 0 else size
        for axis, size in enumerate(sizes)
    ]


def flatten(call: Call) -> Value:
    x = call.tensor(0)
    axis = normal_axis(call.attribute("axis", 1), x.ndim)
    if axis == 0:
        return x.reshape(1, -1)
    head = x.flatten(0, axis - 1) if axis > 1 else x
    return head.flatten(1) if head.ndim > 1 else head.unsqueeze(1)


def transpose(call: Call) -> Value:
    x = call.value(0)
    order = call.attribute("perm", list(reversed(range(len(x.shape)))))
    if isinstance(x, Numbers):
        return from_array(x.array.transpose(order))
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return x
    return x.transpose(*moved) if len(moved) == 2 else x.permute(order)


def squeeze(call: Call) -> Value:
    value, axes = call.value(0), call.axes(1)
    if isinstance(value, Numbers):
        return from_array(value.array.squeeze(None if axes is None else tuple(axes)))
    if axes is None:
        raise Unsupported("without axes")  # would take a batch of one away
    for axis in sorted((normal_axis(axis, value.ndim) for axis in axes), reverse=True):
        value = value.squeeze(axis)
    return value


def unsqueeze(call: Call) -> Value:
    value, axes = call.value(0), call.axes(1)
    assert axes is not None
    if isinstance(value, Numbers):
        return from_array(np.expand_dims(value.array, tuple(axes)))
    for axis in sorted(normal_axis(axis, value.ndim + len(axes)) for axis in axes):
        value = value.unsqueeze(axis)
    return value


def expand(call: Call) -> Value:
    value, sizes = call.value(0), call.numbers(1)
    if isinstance(value, Numbers) and _are_few(sizes):
        return from_array(np.broadcast_to(value.array, np.broadcast_shapes(value.shape, sizes)))
    value = call.tensor(0)
    # Either may be the longer, and either may be 1.
    pairs = zip_longest(reversed(value.shape), reversed(sizes), fillvalue=1)
    wanted = [own if _is_one(asked) else asked for own, asked in pairs]
    return value.expand(wanted[::-1])


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def tile(call: Call) -> Value:
    x, times = call.tensor(0), call.numbers(1)
    _check_affordable([*x.shape, *times])
    return x.repeat(times)


def _are_few(sizes: list[Any]) -> bool:
    """Whether a shape holds so few numbers that they may be sizes."""
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= MOST_NUMBERS


def _check_affordable(sizes: list[Any]) -> None:
    """Refuse to fill the memory at the request of a few bytes in a file."""
    count = math.prod(size for size in sizes if isinstance(size, int))
    if count > MOST_FILLED:
        raise Unsupported(f"which makes a tensor of {count:,} numbers")


def constant_of_shape(call: Call) -> Value:
    sizes, value = call.numbers(0), call.attribute("value", torch.zeros(1))
    if not value.is_floating_point() and _are_few(sizes):
        return Numbers((value.item(),) * math.prod(sizes), tuple(sizes))
    devices = [each.device for each in call.inputs if isinstance(each, Tensor)]
    _check_affordable(sizes)
    return torch.full(
        sizes, value.item(), dtype=value.dtype, device=devices[0] if devices else None
    )


def range_(call: Call) -> Value:
    start, limit, delta = (call.operand(index) for index in range(3))
    if all(isinstance(each, int) for each in (start, limit, delta)):
        count = len(range(start, limit, delta))
        if count <= MOST_NUMBERS:
            return row(range(start, limit, delta))
        _check_affordable([count])
    return torch.arange(start, limit, delta)


def constant(call: Call) -> Value:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in call.attributes:
            return as_value(torch.as_tensor(call.attributes[name]))
    raise Unsupported(f"with {', '.join(call.attributes)}")


def concat(call: Call) -> Value:
    axis = call.attribute("axis")
    if call.are_numbers():
        arrays = [each.array for each in call.inputs if isinstance(each, Numbers)]
        return from_array(np.concatenate(arrays, axis))
    parts = [call.tensor(index) for index in range(len(call.inputs))]
    return torch.cat(_same_batch(parts, axis), axis)


def _same_batch(parts: list[Tensor], axis: int) -> list[Tensor]:
    """Repeat a constant for the batch: a class token of a file that was made with a batch of 1."""
    if normal_axis(axis, parts[0].ndim) == 0 or len(parts) < 2:
        return parts
    batch = next((part.shape[0] for part in parts if not _is_one(part.shape[0])), 1)
    return [
        part.expand(batch, *part.shape[1:]) if _is_one(part.shape[0]) else part for part in parts
    ]


def split(call: Call) -> Any:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    sizes = call.axes(1, "split")
    if sizes is None:
        count = call.attribute("num_outputs", call.num_outputs)
        sizes = -(-x.shape[axis] // count)
    return torch.functional.split(x, sizes, axis)


def depth_to_space(call: Call) -> Value:
    x, block = call.tensor(0), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return torch.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    parts = x.reshape(n, block, block, c // block**2, h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


def space_to_depth(call: Call) -> Value:
    x, block = call.tensor(0), call.attribute("blocksize")
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // block, block, w // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)


def pad(call: Call) -> Value:
    x, pads = call.tensor(0), call.axes(1, "pads")
    assert pads is not None
    axes = call.numbers(3) if call.has(3) else list(range(x.ndim))
    around = {
        normal_axis(axis, x.ndim): (pads[index], pads[index + len(axes)])
        for index, axis in enumerate(axes)
    }
    value = call.operand(2) if call.has(2) else 0.0
    return pad_axes(x, around, call.attribute("mode", "constant"), value)


def pad_axes(
    x: Tensor, around: dict[int, tuple[int, int]], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """Pad (or, below zero, crop) axes by (before, after)."""
    around = {axis: both for axis, both in around.items() if both != (0, 0)}
    if not around:
        return x
    axes = range(x.ndim - 1, min(around) - 1, -1)  # torch counts them from the last
    flat = [size for axis in axes for size in around.get(axis, (0, 0))]
    if mode != "constant":
        return F.pad(x, flat, {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])
    return F.pad(x, flat, value=value) if value else F.pad(x, flat)


TABLE: dict[str, Callable[[Call], Any]] = {
    "Shape": shape,
    "Size": size,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Tile": tile,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Range": range_,
    "Concat": concat,
    "Split": split,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
    "Pad": pad,
}
