"""Weights that are computed from others in each forward."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import unify_
from slimdown.capture.ops.pointwise import broadcast


def weight_norm(call: Call) -> Shape:
    """g · v / |v|, one norm and one g for each slice of v along `dim`, or for all where it is -1.

    What is removed along the other dims no longer counts in the norm. Salimans 2016,
    arXiv:1602.07868.
    """
    v, g = call.shape("v"), call.shape("g")
    call.mix()
    if call.integer("dim") == -1:
        call.spare(*v)
        return broadcast([v, g])
    axis = call.axis("dim", len(v))
    unify_(v[axis], g[axis])
    call.spare(*v[:axis], *v[axis + 1 :])
    return v
