"""Operators whose result depends on a whole dimension, which therefore keeps all its channels."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import Var, freeze_


def softmax(call: Call) -> Shape:
    """Softmax and log-softmax along one axis."""
    x = call.shape("self")
    freeze_(x[call.axis("dim", len(x))], call.name)
    return x


def reduction(call: Call) -> Shape:
    """Mean, sum, maximum, … over some axes (all, where none is given), with or without keepdim."""
    x = call.shape("self")
    given = call.argument("dim") if "dim" in call.names else None
    axes = call.integers("dim") if given is not None else []
    reduced = {axis % len(x) for axis in axes or range(len(x))}
    for axis in reduced:
        freeze_(x[axis], call.name)
    keepdim = len(call.output_sizes()) == len(x)
    return tuple(
        Var(1) if axis in reduced else dim
        for axis, dim in enumerate(x)
        if keepdim or axis not in reduced
    )
