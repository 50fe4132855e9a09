"""The weights of a graph's convolutions and linear layers, as matrices whose columns are inputs.

The columns of a convolution are ordered by kernel position and then by input channel: what is next
to each other is what a runtime multiplies together, and what N:M patterns are defined on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Generator, Tensor
from torch.fx import GraphModule, Node

from slimdown.capture import find_tensor
from slimdown.capture.call import arguments_of, module_of, operator_name
from slimdown.prune.compensation.readers import Reader, reader_of
from slimdown.prune.sites import CONVOLUTIONS, LINEAR, TRANSPOSED

LAYERS = (LINEAR, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One layer's weight; C are the input channels that each output sees, T the kernel's taps."""

    name: str
    """Of its tensor in the state."""
    layer: str
    """Of its module."""
    node: Node = field(repr=False)
    reader: Reader = field(repr=False)
    num_inputs: int
    """C: what an N:M pattern divides."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(groups, outputs of a group, T·C)"""
        return self._by_tap(self.reader.matrix(weight).mT)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Undo `to_matrix`."""
        by_channel = matrix.reshape(*matrix.shape[:-1], -1, self.num_inputs).mT.flatten(-2)
        return self.reader.weight(by_channel.mT).contiguous()

    def columns(self, x: Tensor, count: int | None = None) -> Tensor:
        """A batch of the layer's inputs as its matrix meets them, (groups, T·C, samples).

        All output positions, or `count` of them, drawn in the same way each time.
        """
        total = self._num_positions(x)
        positions = torch.arange(total)
        if count is not None and count < total:
            positions = torch.randperm(total, generator=Generator().manual_seed(0))[:count]
        return self._by_tap(self.reader.patches(x, positions.to(x.device))).mT

    def _by_tap(self, rows: Tensor) -> Tensor:
        """(…, C·T) as (…, T·C)."""
        return rows.reshape(*rows.shape[:-1], self.num_inputs, -1).mT.flatten(-2)

    def _num_positions(self, x: Tensor) -> int:
        if not self.reader.kernel:
            return x.numel() // x.shape[-1]
        output: Tensor = self.node.meta["val"]
        return len(x) * prod(output.shape[2:])


def find_weights(graph_module: GraphModule) -> tuple[list[Weight], dict[str, str]]:
    """The weights that can be made sparse, in the graph's order, and why the others cannot.

    A weight that several layers share is found once.
    """
    found: dict[str, Weight] = {}
    refused: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or operator_name(node) not in LAYERS:
            continue
        source = arguments_of(node)["weight"]
        if source.op != "get_attr":
            refused[module_of(node)] = "its weight is computed, such as a quantized one"
        elif source.target not in found:
            found[source.target] = _weight_of(graph_module, node, source.target)
    return list(found.values()), refused


def _weight_of(graph_module: GraphModule, node: Node, name: str) -> Weight:
    weight = find_tensor(graph_module, name)
    reader = reader_of(node, weight)
    return Weight(
        name=name,
        layer=name.removesuffix(".weight"),
        node=node,
        reader=reader,
        num_inputs=reader.matrix(weight).shape[1] // prod(reader.kernel),
    )
