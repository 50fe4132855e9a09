"""Convolutions, dense, grouped and depthwise."""

from __future__ import annotations

from slimdown.capture.call import KERNEL, SPATIAL, Call, Shape, Unsupported
from slimdown.capture.dims import Dim, Var, freeze_, product, unify_


def convolution(call: Call) -> Shape:
    """Input (N, G·C, …) and weight (G·K, C, …) to (N, G·K, …).

    A group takes C of the input's channels to K of the output's. Dense is G = 1; depthwise is
    C = 1, so that the groups *are* the channels. Whole groups can go, and channels of all groups.
    """
    x, weight, groups = _operands(call)
    unify_(x[1], product(groups, weight[1]))
    unify_(weight[0], product(groups, Var(weight[0].size // groups.size)))
    output = _output(call, x, channels=weight[0])
    call.cost(x[0], *output[2:], *weight)
    return output


def transposed_convolution(call: Call) -> Shape:
    """Input (N, G·C, …) and weight (G·C, K, …) to (N, G·K, …)."""
    x, weight, groups = _operands(call)
    unify_(x[1], weight[0])
    unify_(weight[0], product(groups, Var(weight[0].size // groups.size)))
    call.cost(*x[:1], *x[2:], *weight)  # the kernel is applied at each position of the input
    return _output(call, x, channels=product(groups, weight[1]))


def any_convolution(call: Call) -> Shape:
    """`aten::convolution`, to which the others decompose."""
    return (transposed_convolution if call.argument("transposed") else convolution)(call)


def _operands(call: Call) -> tuple[Shape, Shape, Var]:
    x, weight, groups = call.shape("input"), call.shape("weight"), Var(call.integer("groups"))
    if len(x) != len(weight):
        raise Unsupported  # an input without a batch
    for dim in weight[2:]:
        freeze_(dim, KERNEL)
    for dim in x[2:]:
        freeze_(dim, SPATIAL)
    call.edit("groups", lambda size: size(groups))
    return x, weight, groups


def _output(call: Call, x: Shape, *, channels: Dim) -> Shape:
    bias = call.optional_shape("bias")
    if bias is not None:
        unify_(bias[0], channels)
    call.layer("weight", channels)
    return (x[0], channels, *(Var(size, SPATIAL) for size in call.output_sizes()[2:]))
