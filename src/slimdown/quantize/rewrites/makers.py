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
    ones = [1] * (weight.ndim - 2)
    if family_of(layer) == "conv_transpose":
        return read.view(-1, 1, *ones)
    groups = len(read) // weight.shape[1]
    spread = read.view(groups, 1, -1).expand(groups, len(weight) // groups, -1)
    return spread.reshape(len(weight), -1, *ones)


def rows_of(made: Tensor, layer: Node, weight: Tensor) -> Tensor:
    """One number for each channel that a layer or a norm makes, (C,), as its weight has them."""
    ones = [1] * (weight.ndim - 2)
    if family_of(layer) != "conv_transpose":
        return made.view(-1, *[1] * (weight.ndim - 1))
    groups = len(made) // weight.shape[1]
    spread = made.view(groups, 1, -1).expand(groups, len(weight) // groups, -1)
    return spread.reshape(len(weight), -1, *ones)


def _argument(node: Node, place: int) -> Node | None:
    value = node.args[place] if place < len(node.args) else None
    return value if isinstance(value, Node) else None
