"""What each ATen operator is to a quantizer."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

aten = torch.ops.aten

_MEMBERS = {
    # Layers: a weight and a bias on top of an activation.
    "conv": (
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.conv3d.padding,
    ),
    "linear": (aten.linear.default,),
    "conv_transpose": (
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    ),
    "add": (aten.add.Tensor, aten.add_.Tensor),
    "matmul": (
        aten.matmul.default,
        aten.bmm.default,
        aten.scaled_dot_product_attention.default,
    ),
    # Bounds on a value: a grid behind them keeps them already, so runtimes drop them.
    "clip": (
        aten.relu.default,
        aten.relu_.default,
        aten.relu6.default,
        aten.relu6_.default,
        aten.hardtanh.default,
        aten.hardtanh_.default,
        aten.clamp.default,
        aten.clamp_.default,
    ),
    # Moves values and keeps them as they are: what enters on a grid leaves on it.
    "move": (
        aten.max_pool2d.default,
        aten.upsample_nearest2d.vec,
        aten.pixel_shuffle.default,
        aten.channel_shuffle.default,
        aten.pad.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
    ),
    # Puts tensors beside each other; where all are on one grid, so is the result.
    "join": (aten.cat.default,),
    # Nothing at all, in a graph in eval mode.
    "identity": (
        aten.contiguous.default,
        aten.clone.default,
        aten.dropout.default,
        aten.dropout_.default,
    ),
}

FAMILY_OF: dict[object, str] = {
    member: family for family, members in _MEMBERS.items() for member in members
}
"""Operator -> family; what is not listed computes in float and is of no interest."""

LAYERS = frozenset({"conv", "linear"})
"""Families whose weight can be quantized."""

HEAVY = LAYERS | {"conv_transpose", "matmul"}
"""Families that do most of a network's arithmetic."""


def family_of(node: Node) -> str | None:
    """The family of a node; None for what computes in float."""
    if node.target is operator.getitem:  # of the parts of a split, or of a tuple of results
        source = node.args[0]
        return "move" if isinstance(source, Node) and family_of(source) == "move" else None
    if node.target is aten.pad.default and len(node.args) > 3 and node.args[3]:
        return None  # pads with a new value, which may lie off the grid
    return FAMILY_OF.get(node.target) if node.op == "call_function" else None
