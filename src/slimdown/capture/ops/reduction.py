"""Operators that sum up a dimension: what is removed from it no longer counts."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import Dim
from slimdown.capture.ops.axiswise import reduced, several_reductions
from slimdown.capture.ops.pointwise import broadcast, pointwise

AVERAGES = frozenset(
    {"mean", "std", "var", "norm", "linalg_norm", "linalg_vector_norm", "cosine_similarity"}
)
"""Reductions that scale what they see to a size that was learned; see `Call.spare`."""


def reduction(call: Call) -> Shape:
    """Mean, sum, maximum, … over some axes (all, where none is given), with or without keepdim."""
    x = call.shape("self")
    axes = call.axes(len(x))
    _sum_up(call, *(x[axis] for axis in axes))
    return reduced(call, x, axes)


def extremum_or_reduction(call: Call) -> Shape | list[Shape]:
    """`max` and `min`: of two tensors, of all values, or along an axis and where."""
    if "other" in call.names:
        return pointwise(call)
    return several_reductions(call) if call.has_several_outputs else reduction(call)


def cosine_similarity(call: Call) -> Shape:
    """Of two tensors that broadcast, along one axis."""
    x = broadcast([call.shape("x1"), call.shape("x2")])
    axes = call.axes(len(x))
    _sum_up(call, *(x[axis] for axis in axes))
    return reduced(call, x, axes)


def _sum_up(call: Call, *dims: Dim) -> None:
    call.mix()
    if call.name in AVERAGES:
        call.spare(*dims)
