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
    axiswise,
    contraction,
    convolution,
    creation,
    joining,
    lookup,
    norm,
    parametrized,
    pointwise,
    pooling,
    recurrent,
    reduction,
    regions,
    reshaping,
    windows,
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
    "convolution": convolution.any_convolution,
    "linear": contraction.linear,
    "embedding": lookup.embedding,
    "_weight_norm": parametrized.weight_norm,
    "lstm": recurrent.recurrent,
    "gru": recurrent.recurrent,
    "rnn_tanh": recurrent.recurrent,
    "rnn_relu": recurrent.recurrent,
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
    "mv": contraction.matmul,
    "dot": contraction.matmul,
    "vdot": contraction.matmul,
    "addmm": contraction.added_product,
    "baddbmm": contraction.added_product,
    "addbmm": contraction.added_sum_of_products,
    "outer": contraction.outer_product,
    "einsum": contraction.einsum,
    "scaled_dot_product_attention": contraction.attention,
    # reductions
    "mean": reduction.reduction,
    "sum": reduction.reduction,
    "amax": reduction.reduction,
    "amin": reduction.reduction,
    "var": reduction.reduction,
    "std": reduction.reduction,
    "norm": reduction.reduction,
    "linalg_norm": reduction.reduction,
    "linalg_vector_norm": reduction.reduction,
    "var_mean": axiswise.several_reductions,
    "std_mean": axiswise.several_reductions,
    "max": reduction.extremum_or_reduction,
    "min": reduction.extremum_or_reduction,
    "cosine_similarity": reduction.cosine_similarity,
    # along an axis, by its numbering
    **dict.fromkeys(axiswise.ALONG_AXES, axiswise.along_axes),
    "diff": axiswise.diff,
    "tril": axiswise.triangle,
    "triu": axiswise.triangle,
    "argmax": axiswise.frozen_reduction,
    "argmin": axiswise.frozen_reduction,
    "prod": axiswise.frozen_reduction,
    "logsumexp": axiswise.frozen_reduction,
    "all": axiswise.frozen_reduction,
    "any": axiswise.frozen_reduction,
    # pooling and resizing
    **dict.fromkeys(pooling.NAMES, pooling.pooling),
    "torchvision::roi_align": regions.roi_align,
    # between space and channels
    "im2col": windows.im2col,
    "col2im": windows.col2im,
    "unfold": windows.unfold,
    "pixel_shuffle": windows.pixel_shuffle,
    "pixel_unshuffle": windows.pixel_unshuffle,
    "channel_shuffle": windows.channel_shuffle,
    "native_channel_shuffle": windows.channel_shuffle,
    "grid_sampler": windows.grid_sample,
    "grid_sampler_2d": windows.grid_sample,
    "grid_sampler_3d": windows.grid_sample,
    # the same values in another shape
    "view": reshaping.reshape,
    "reshape": reshaping.reshape,
    "_unsafe_view": reshaping.reshape,
    "view_as": reshaping.reshape_as,
    "reshape_as": reshaping.reshape_as,
    "flatten": reshaping.flatten,
    "ravel": reshaping.flatten,
    "unflatten": reshaping.unflatten,
    "permute": reshaping.permute,
    "transpose": reshaping.transpose,
    "swapaxes": reshaping.transpose,
    "swapdims": reshaping.transpose,
    "movedim": reshaping.movedim,
    "moveaxis": reshaping.movedim,
    "t": reshaping.reverse,
    "numpy_T": reshaping.reverse,
    "mT": reshaping.swap_last,
    "adjoint": reshaping.swap_last,
    "unsqueeze": reshaping.unsqueeze,
    "squeeze": reshaping.squeeze,
    "expand": reshaping.expand,
    "broadcast_to": reshaping.expand,
    "expand_as": reshaping.expand_as,
    "repeat": reshaping.repeat,
    "tile": reshaping.repeat,
    "repeat_interleave": reshaping.repeat_interleave,
    "view_as_complex": reshaping.view_as_complex,
    "view_as_real": reshaping.view_as_real,
    # joining and taking apart
    "cat": joining.cat,
    "concat": joining.cat,
    "concatenate": joining.cat,
    "stack": joining.stack,
    "split": joining.split,
    "split_with_sizes": joining.split,
    "unsafe_split": joining.split,
    "unsafe_split_with_sizes": joining.split,
    "chunk": joining.split,
    "unsafe_chunk": joining.split,
    "tensor_split": joining.split,
    "unbind": joining.unbind,
    "select": joining.select,
    "slice": joining.slice_,
    "narrow": joining.narrow,
    "glu": joining.glu,
    "pad": joining.pad,
    "constant_pad_nd": joining.pad,
    # looking up
    "index": lookup.index,
    "index_put": lookup.index_put,
    "index_select": lookup.index_select,
    "index_add": lookup.index_change,
    "index_copy": lookup.index_change,
    "index_fill": lookup.index_change,
    "gather": lookup.gather,
    "take_along_dim": lookup.take_along_dim,
    "scatter": lookup.scatter,
    "scatter_add": lookup.scatter,
    "scatter_reduce": lookup.scatter,
    "one_hot": lookup.one_hot,
    "bucketize": lookup.among,
    "isin": lookup.among,
    # made by the graph itself
    **dict.fromkeys(creation.FILLED, creation.filled),
    "arange": creation.numbered,
    "linspace": creation.numbered,
    "eye": creation.numbered,
    "meshgrid": creation.meshgrid,
    # element by element
    "prelu": pointwise.prelu,
    "broadcast_tensors": pointwise.broadcast_tensors,
    "to": pointwise.like_self,
    "_to_copy": pointwise.like_self,
    "type_as": pointwise.like_self,
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
