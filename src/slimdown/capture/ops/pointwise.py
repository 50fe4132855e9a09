"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, unify_

UNTAGGED = (
    "alias",
    "clone",
    "contiguous",
    "copy",
    "detach",
    "dropout",
    "empty_like",
    "feature_dropout",
    "fill",
    "full_like",
    "hardswish",
    "lift_fresh_copy",
    "log_sigmoid",
    "masked_fill",
    "ones_like",
    "rsub",
    "to",
    "_to_copy",
    "type_as",
    "where",
    "zero",
    "zeros_like",
)
"""Operators that are element by element, but not tagged so by torch."""


def pointwise(call: Call) -> Shape:
    """Every input broadcasts to the output."""
    output = broadcast(call.input_shapes())
    if [dim.size for dim in output] != call.output_sizes():
        raise Unsupported
    return output


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """Unify shapes as broadcasting does: aligned at the last dim, a size of 1 fits every size."""
    shapes = list(shapes)
    ndim = max((len(shape) for shape in shapes), default=0)
    return tuple(
        _unify_all_([shape[-axis] for shape in shapes if len(shape) >= axis])
        for axis in range(ndim, 0, -1)
    )


def _unify_all_(dims: list[Dim]) -> Dim:
    wide = [dim for dim in dims if dim.size != 1]
    for dim in wide[1:]:
        unify_(wide[0], dim)
    return wide[0] if wide else Var(1)


def prelu(call: Call) -> Shape:
    """(N, C, …) with one slope, or one a channel."""
    x, slope = call.shape("self"), call.shape("weight")
    if slope and slope[0].size != 1:
        unify_(slope[0], x[1])
    return x


def fake_quantize_per_tensor(call: Call) -> Shape:
    """One scale and zero point for all of `x`."""
    return call.shape("x")


def fake_quantize_per_channel(call: Call) -> Shape:
    """One scale and zero point for each channel of `x` along `axis`."""
    x = call.shape("x")
    axis = call.axis("axis", len(x))
    for name in ("scale", "zero_point"):
        unify_(call.shape(name)[0], x[axis])
    return x
