"""Weights that are computed from others in each forward."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import unify_


def weight_norm(call: Call) -> Shape:
    """g · v / |v|, one norm and one g for each slice of v along `dim`.

    What is removed along the other dims no longer counts in the norm. Salimans 2016,
    arXiv:1602.07868.
    """
    v, g = call.shape("v"), call.shape("g")
    axis = call.axis("dim", len(v))
    unify_(v[axis], g[axis])
    call.spare(*v[:axis], *v[axis + 1 :])
    call.mix()
    return v
