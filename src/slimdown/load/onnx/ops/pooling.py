"""Windows over space: pooling, and where a window's padding lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimdown.load.onnx.call import Call, Unsupported
from slimdown.load.onnx.numbers import Value
from slimdown.load.onnx.ops.shapes import pad_axes


def paddings(
    attributes: Any, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The padding before and after each axis of space, `auto_pad` worked out for these sizes."""
    ndim = len(kernel)
    auto = attributes.get("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = attributes.get("pads", [0] * (2 * ndim))
        return list(pads[:ndim]), list(pads[ndim:])
    if auto == "VALID":
        return [0] * ndim, [0] * ndim
    strides = attributes.get("strides", [1] * ndim)
    dilations = attributes.get("dilations", [1] * ndim)
    totals = [
        max((math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def pad_space(x: Tensor, before: list[int], after: list[int], value: float = 0.0) -> Tensor:
    around = {2 + axis: both for axis, both in enumerate(zip(before, after, strict=True))}
    return pad_axes(x, around, value=value)


def max_pool(call: Call) -> Value:
    if call.num_outputs > 1:
        raise Unsupported("with the output Indices")
    x, kernel = call.tensor(0), call.attribute("kernel_shape")
    before, after = paddings(call.attributes, x.shape[2:], kernel)
    if not _is_simple(before, after, kernel):
        x, before = pad_space(x, before, after, -math.inf), [0] * len(kernel)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    strides = call.attribute("strides", [1] * len(kernel))
    dilations = call.attribute("dilations", [1] * len(kernel))
    return pool(x, kernel, strides, before, dilations, bool(call.attribute("ceil_mode", 0)))


def average_pool(call: Call) -> Value:
    x, kernel = call.tensor(0), call.attribute("kernel_shape")
    if any(each != 1 for each in call.attribute("dilations", [1])):
        raise Unsupported("with dilations")
    before, after = paddings(call.attributes, x.shape[2:], kernel)
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    strides = call.attribute("strides", [1] * len(kernel))
    counts, ceils = (bool(call.attribute(name, 0)) for name in ("count_include_pad", "ceil_mode"))
    if _is_simple(before, after, kernel):
        return pool(x, kernel, strides, before, ceils, counts)  # type: ignore[no-any-return]
    if ceils:
        raise Unsupported("with ceil_mode and uneven padding")
    padded = pool(pad_space(x, before, after), kernel, strides)
    if counts:
        return padded  # type: ignore[no-any-return]
    share = pool(pad_space(torch.ones_like(x[:1, :1]), before, after), kernel, strides)
    return padded / share  # type: ignore[no-any-return]


def _is_simple(before: list[int], after: list[int], kernel: Sequence[int]) -> bool:
    """Whether torch's own pooling can pad like this."""
    return before == after and all(2 * a <= b for a, b in zip(before, kernel, strict=True))


def global_average_pool(call: Call) -> Value:
    x = call.tensor(0)
    if x.ndim == 4:
        return F.adaptive_avg_pool2d(x, 1)
    return x.mean(list(range(2, x.ndim)), keepdim=True)


def global_max_pool(call: Call) -> Value:
    x = call.tensor(0)
    return x.amax(list(range(2, x.ndim)), keepdim=True)


TABLE: dict[str, Callable[[Call], Any]] = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
}
