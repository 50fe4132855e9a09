"""What makes the channels of a graph: layers and affine norms, and how their tensors lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from slimdown.quantize.families import family_of

aten = torch.ops.aten

NORMS: dict[Any, tuple[int, int, int | None]] = {
    aten.batch_norm.default: (1, 1, 2),
    aten.group_norm.default: (1, 2, 3),
    aten.layer_norm.default: (-1, 2, 3),
    aten.rms_norm.default: (-1, 2, None),
}
"""Norm -> the axis of its channels, and where among its arguments the gain and the bias are."""


def channel_axis(node: Node) -> int | None:
    """The axis of the channels that a layer or an affine norm makes; None of all else."""
    family = family_of(node)
    if family in ("conv", "conv_transpose"):
        return 1
    if family == "linear":
        return -1
    if node.target not in NORMS:
        return None
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        shape = node.args[1]
        if not isinstance(shape, Sequence) or len(shape) != 1:
            return None  # its gain is one a position, too
    return NORMS[node.target][0]


def is_norm(node: Node) -> bool:
    return node.target in NORMS


def tensors_of(node: Node) -> tuple[Node | None, Node | None]:
    """The nodes of the weight (or gain) and of the bias of a layer or a norm."""
    _, weight, bias = NORMS.get(node.target, (1, 1, 2))
    return _argument(node, weight), None if bias is None else _argument(node, bias)


def is_own(
    node: Node, attributes: Mapping[str, Tensor | nn.Module], uses: Mapping[int, int]
) -> bool:
    """Whether the weight is stored, and neither it nor the bias is read by another node."""
    weight, bias = tensors_of(node)
    tensors = [tensor for tensor in (weight, bias) if tensor is not None]
    return weight is not None and all(
        tensor.op == "get_attr" and uses[id(attributes[str(tensor.target)])] == 1
        for tensor in tensors
    )


def factors_of(read: Tensor, layer: Node, weight: Tensor) -> Tensor:
    """One number for each channel that a layer reads, (C_in,), spread over its weight's shape."""
    if family_of(layer) == "conv_transpose":
        return _one_a_row(read, weight)
    return spread_over_rows(read, *weight.shape[:2]).view(*weight.shape[:2], *_ones(weight))


def rows_of(made: Tensor, layer: Node, weight: Tensor) -> Tensor:
    """One number for each channel that a layer or a norm makes, (C,), as its weight has them."""
    if family_of(layer) != "conv_transpose":
        return _one_a_row(made, weight)
    return spread_over_rows(made, *weight.shape[:2]).view(*weight.shape[:2], *_ones(weight))


def spread_over_rows(values: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """One number for each channel of all groups, (groups * num_columns,), in the rows of its group.

    (num_rows, num_columns), as the first two axes of a weight lie.
    """
    groups = len(values) // num_columns
    rows = values.view(groups, 1, -1).expand(groups, num_rows // groups, -1)
    return rows.reshape(num_rows, num_columns)


def _one_a_row(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.ndim - 1))


def _ones(weight: Tensor) -> list[int]:
    """The sizes of the kernel's axes where all are 1."""
    return [1] * (weight.ndim - 2)


def _argument(node: Node, place: int) -> Node | None:
    value = node.args[place] if place < len(node.args) else None
    return value if isinstance(value, Node) else None
