"""Where a graph's layers read channels and make new ones.

A *site* is one call of a convolution or linear layer. What it reads it multiplies by the rows of
its weight that belong to the channel; what it makes comes out of other rows of the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from slimdown.capture import Analysis
from slimdown.capture.call import arguments_of, operator_name
from slimdown.capture.dims import Dim, Var, leaves

LINEAR = "aten::linear"
CONVOLUTIONS = tuple(f"aten::conv{n}d" for n in (1, 2, 3))
TRANSPOSED = tuple(f"aten::conv_transpose{n}d" for n in (1, 2, 3))
PRODUCTS = {
    "aten::matmul": ("self", "other"),
    "aten::mm": ("self", "mat2"),
    "aten::addmm": ("mat1", "mat2"),
}
"""The operators that may multiply by a matrix of parameters, each with its operands."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One call of a layer: the channels that it reads and those that it makes."""

    node: Node
    input: Node
    """What it reads."""
    axis: int
    """Of the channels, in its input as in its output."""
    weight: str
    """The name of its weight's tensor."""
    groups: int
    """Of a convolution; 1 for all else."""
    transposed: bool
    """Whether the weight's first axis is what it reads, not what it makes."""
    reads: Dim
    makes: Dim
    passed: frozenset[Var]
    """The groups of a grouped or depthwise convolution: made and read by the same rows."""

    @property
    def read_leaves(self) -> list[Var]:
        """The leaves that it reads and does not just pass on."""
        return [leaf for leaf in dict.fromkeys(leaves(self.reads)) if leaf not in self.passed]

    def reading_rows(self, weight: Tensor) -> Tensor:
        """The rows of `weight` that read each channel: (reads.size, …)."""
        if self.transposed:
            return weight  # (G·C, K, …)
        return self._swap_in_groups(weight)  # (G·K, C, …)

    def making_rows(self, weight: Tensor) -> Tensor:
        """The rows of `weight` that make each channel: (makes.size, …)."""
        if not self.transposed:
            return weight  # (G·K, C, …)
        return self._swap_in_groups(weight)  # (G·C, K, …)

    def _swap_in_groups(self, weight: Tensor) -> Tensor:
        """(G·A, B, …) -> (G·B, A, …); a view where there is one group."""
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)


def find_sites(analysis: Analysis) -> list[Site]:
    """All calls of convolutions and linear layers whose dims are known, in the graph's order."""
    weights = {layer.weight for layer in analysis.layers}
    found = (_site_of(node, analysis) for node in analysis.graph_module.graph.nodes)
    return [site for site in found if site is not None and site.weight in weights]


def find_products(analysis: Analysis) -> list[Site]:
    """Products with a matrix of parameters, such as `x @ self.weight`: layers without a module."""
    weights = {layer.weight for layer in analysis.layers}
    found = (_product_of(node, analysis) for node in analysis.graph_module.graph.nodes)
    return [site for site in found if site is not None and site.weight in weights]


def _product_of(node: Node, analysis: Analysis) -> Site | None:
    if not isinstance(node.target, torch._ops.OpOverload) or operator_name(node) not in PRODUCTS:
        return None
    source, weight = (arguments_of(node)[name] for name in PRODUCTS[operator_name(node)])
    if weight.op != "get_attr" or len(analysis.shapes.get(weight, ())) != 2:
        return None
    if source not in analysis.shapes or node not in analysis.shapes:
        return None
    return Site(
        node=node,
        input=source,
        axis=-1,
        weight=str(weight.target),
        groups=1,
        transposed=True,  # (K, N)
        reads=analysis.shapes[source][-1],
        makes=analysis.shapes[node][-1],
        passed=frozenset(),
    )


def _site_of(node: Node, analysis: Analysis) -> Site | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = operator_name(node)
    if name not in (LINEAR, *CONVOLUTIONS, *TRANSPOSED):
        return None
    arguments = arguments_of(node)
    source, weight = arguments["input"], _tensor_behind(arguments["weight"])
    if weight is None or source not in analysis.shapes or node not in analysis.shapes:
        return None
    axis = -1 if name == LINEAR else 1
    groups = int(arguments.get("groups", 1))
    reads, makes = analysis.shapes[source][axis], analysis.shapes[node][axis]
    through: set[Var] = set()
    if groups > 1:  # the channels within a group, which are read or made, have an axis of their own
        through = {*leaves(reads)} & {*leaves(makes)} - {*leaves(analysis.tensors[weight][1])}
    return Site(
        node=node,
        input=source,
        axis=axis,
        weight=weight,
        groups=groups,
        transposed=name in TRANSPOSED,
        reads=reads,
        makes=makes,
        passed=frozenset(through),
    )


def _tensor_behind(node: Node) -> str | None:
    """The name of the tensor that a weight is computed from, such as by a fake quantization."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else None
