"""Normalizations."""

from __future__ import annotations

from slimdown.capture.call import Call, Shape
from slimdown.capture.dims import Var, product, unify_


def per_channel(call: Call) -> Shape:
    """Batch and instance norm: (N, C, …), every channel by itself.

    Where the statistics are those of `x` itself, removing from the dims that they are taken over
    changes them: weights standardized in the forward are (1, K, C·kH·kW).
    """
    x = call.shape("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        statistic = call.optional_shape(name)
        if statistic is not None:
            unify_(statistic[0], x[1])
    if call.argument("training" if "training" in call.names else "use_input_stats"):
        call.spare(*x[2:])
        call.mix()
    return x


def layer_norm(call: Call) -> Shape:
    """Layer and RMS norm over the last dims; of those, only the kept channels are averaged."""
    x = call.shape("input")
    normalized = x[-len(call.integers("normalized_shape")) :]
    for name in ("weight", "bias"):
        for dim, own in zip(call.optional_shape(name) or (), normalized, strict=False):
            unify_(dim, own)
    call.edit("normalized_shape", lambda size: [size(dim) for dim in normalized])
    call.spare(*normalized)
    call.mix()
    return x


def group_norm(call: Call) -> Shape:
    """(N, G·C, …), averaged over the C channels of a group; whole groups can go, too."""
    x = call.shape("input")
    groups = Var(call.integer("num_groups"))
    members = Var(x[1].size // groups.size)
    unify_(x[1], product(groups, members))
    for name in ("weight", "bias"):
        scale = call.optional_shape(name)
        if scale is not None:
            unify_(scale[0], x[1])
    call.edit("num_groups", lambda size: size(groups))
    call.spare(members)
    call.mix()
    return x
