"""The op table: what each operator demands of the dimensions it touches.

A rule takes a `Call`, unifies dims, tells edits and costs, and returns the dims of the output: a
tuple for one tensor, a list of tuples for several. It raises `Unsupported` for a form that it does
not cover. To add an operator: write its rule in the file of its family, and add its line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.fx import Node

from slimdown.capture.call import Call, Shape, operator_name
from slimdown.capture.ops import (
    contraction,
    convolution,
    joining,
    norm,
    pointwise,
    pooling,
    reduction,
    reshaping,
)

Rule: TypeAlias = Callable[[Call], Shape | list[Shape]]

TABLE: dict[str, Rule] = {
    # weights
    "conv1d": convolution.convolution,
    "conv2d": convolution.convolution,
    "conv3d": convolution.convolution,
    "conv_transpose1d": convolution.transposed_convolution,
    "conv_transpose2d": convolution.transposed_convolution,
    "conv_transpose3d": convolution.transposed_convolution,
    "linear": contraction.linear,
    # norms
    "batch_norm": norm.per_channel,
    "instance_norm": norm.per_channel,
    "layer_norm": norm.layer_norm,
    "rms_norm": norm.layer_norm,
    "group_norm": norm.group_norm,
    # products of activations
    "matmul": contraction.matmul,
    "mm": contraction.matmul,
    "bmm": contraction.matmul,
    "scaled_dot_product_attention": contraction.attention,
    # reductions
    "softmax": reduction.softmax,
    "log_softmax": reduction.softmax,
    "mean": reduction.reduction,
    "sum": reduction.reduction,
    "amax": reduction.reduction,
    "amin": reduction.reduction,
    "var": reduction.reduction,
    "std": reduction.reduction,
    "linalg_vector_norm": reduction.reduction,
    # pooling and resizing
    "max_pool1d": pooling.pooling,
    "max_pool2d": pooling.pooling,
    "max_pool3d": pooling.pooling,
    "avg_pool1d": pooling.pooling,
    "avg_pool2d": pooling.pooling,
    "avg_pool3d": pooling.pooling,
    "adaptive_avg_pool1d": pooling.pooling,
    "adaptive_avg_pool2d": pooling.pooling,
    "adaptive_avg_pool3d": pooling.pooling,
    "adaptive_max_pool2d": pooling.pooling,
    "max_pool2d_with_indices": pooling.pooling,
    "upsample_nearest2d": pooling.pooling,
    "upsample_bilinear2d": pooling.pooling,
    "upsample_bicubic2d": pooling.pooling,
    # the same values in another shape
    "view": reshaping.reshape,
    "reshape": reshaping.reshape,
    "_unsafe_view": reshaping.reshape,
    "flatten": reshaping.flatten,
    "unflatten": reshaping.unflatten,
    "permute": reshaping.permute,
    "transpose": reshaping.transpose,
    "t": reshaping.reverse,
    "numpy_T": reshaping.reverse,
    "unsqueeze": reshaping.unsqueeze,
    "squeeze": reshaping.squeeze,
    "expand": reshaping.expand,
    "expand_as": reshaping.expand_as,
    "repeat": reshaping.repeat,
    # joining and taking apart
    "cat": joining.cat,
    "concat": joining.cat,
    "stack": joining.stack,
    "split": joining.split,
    "split_with_sizes": joining.split,
    "chunk": joining.split,
    "tensor_split": joining.split,
    "unbind": joining.unbind,
    "select": joining.select,
    "slice": joining.slice_,
    "index": joining.index,
    "roll": joining.roll,
    "pad": joining.pad,
    "constant_pad_nd": joining.pad,
    # element by element
    "prelu": pointwise.prelu,
    "slimdown::fake_quantize_per_tensor": pointwise.fake_quantize_per_tensor,
    "slimdown::fake_quantize_per_channel": pointwise.fake_quantize_per_channel,
    **dict.fromkeys(pointwise.UNTAGGED, pointwise.pointwise),
}
"""The rule of each operator; those that torch tags as pointwise need no line."""


def find_rule(node: Node) -> Rule | None:
    """The rule of an operator call; None for an operator that the table does not know."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = operator_name(node).removeprefix("aten::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # in place: relu_ moves the same dims as relu
    if name in TABLE:
        return TABLE[name]
    is_pointwise = torch.Tag.pointwise in node.target.tags
    return pointwise.pointwise if is_pointwise else None
