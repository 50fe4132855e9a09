"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable

from slimdown.capture.call import Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, unify_

UNTAGGED = (
    "__and__",
    "__or__",
    "absolute",
    "alias",
    "alpha_dropout",
    "arctan2",
    "bernoulli",
    "clone",
    "complex",
    "conj",
    "contiguous",
    "copy",
    "copysign",
    "data",
    "detach",
    "divide",
    "dropout",
    "empty_like",
    "feature_alpha_dropout",
    "feature_dropout",
    "fill",
    "fix",
    "floor_divide",
    "fmod",
    "full_like",
    "greater",
    "greater_equal",
    "hardswish",
    "imag",
    "isclose",
    "isfinite",
    "isinf",
    "ldexp",
    "less",
    "less_equal",
    "lift_fresh_copy",
    "log_sigmoid",
    "logical_or",
    "masked_fill",
    "multiply",
    "negative",
    "not_equal",
    "ones_like",
    "polar",
    "rand_like",
    "randn_like",
    "real",
    "resolve_conj",
    "resolve_neg",
    "rsub",
    "special_erf",
    "special_expit",
    "subtract",
    "true_divide",
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


def like_self(call: Call) -> Shape:
    """Conversions; the other tensor, if there is one, only tells the type."""
    return call.shape("self")


def broadcast_tensors(call: Call) -> list[Shape]:
    """Several tensors, each expanded to the shape of all."""
    shapes = call.list_of_shapes("tensors")
    return [broadcast(shapes)] * len(shapes)


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
