"""What exporters wrote in several operators, because their opset had no word for it, as one again.

Quantizers and pruning know a layer norm and a GELU as such, and so do runtimes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from slimdown.load.onnx.reader import OnnxGraph, OnnxNode

TOLERANCE = 1e-5
"""Of the constants, which are float32."""


def fuse(graph: OnnxGraph) -> OnnxGraph:
    """The graph with layer norms (opset 17 has a word for them) and GELUs (opset 20) as one node.

    Each takes the place of the last of its nodes; what is not read any more is left out.
    """
    patterns = _Patterns(graph)
    fused = {node.outputs[0]: node for node in patterns.find()}
    nodes = tuple(fused.get(node.outputs[0], node) for node in graph.nodes)
    return replace(graph, nodes=_needed(nodes, graph.outputs))


def _needed(nodes: tuple[OnnxNode, ...], outputs: tuple[str, ...]) -> tuple[OnnxNode, ...]:
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return tuple(reversed(kept))


class _Patterns:
    """A graph to be searched: who makes and who reads a value, and which numbers are constant."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.nodes = graph.nodes
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.readers: dict[str, list[OnnxNode]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.readers.setdefault(name, []).append(node)
        self.constants = dict(graph.constants)
        for node in graph.nodes:
            if node.op == "Constant" and "value" in node.attributes:
                self.constants[node.outputs[0]] = node.attributes["value"]
            elif node.op == "Identity" and node.inputs[0] in self.constants:
                # As which an exporter writes a weight that equals another.
                self.constants[node.outputs[0]] = self.constants[node.inputs[0]]

    def find(self) -> list[OnnxNode]:
        found = [self._gelu(node) for node in self.nodes if node.op == "Erf"]
        found += [self._layer_norm(node) for node in self.nodes if node.op == "Sqrt"]
        return [node for node in found if node is not None]

    def _gelu(self, erf: OnnxNode) -> OnnxNode | None:
        """x · ½ · (1 + erf(x / √2)), the factors in any order. Hendrycks 2016, arXiv:1606.08415."""
        x = self._x_over_root_2(erf.inputs[0])
        plus_one = self._reader(erf.outputs[0], "Add")
        if x is None or plus_one is None or not self._is(self._other(plus_one, erf), 1.0):
            return None
        factors: list[str] = []
        product = plus_one
        while len(factors) < 2:
            times = self._reader(product.outputs[0], "Mul")
            if times is None:
                return None
            factors += self._factors(self._other(times, product))
            product = times
        values = [name for name in factors if name == x]
        halves = [name for name in factors if self._is(name, 0.5)]
        if len(factors) != 2 or len(values) != 1 or len(halves) != 1:
            return None
        return OnnxNode("Gelu", product.name, (x,), product.outputs, {}, "")

    def _x_over_root_2(self, name: str) -> str | None:
        node = self.makers.get(name)
        if node is None or node.op not in ("Div", "Mul"):
            return None
        x, factor = node.inputs
        if node.op == "Mul" and x in self.constants:
            x, factor = factor, x
        root = math.sqrt(2)
        return x if self._is(factor, root if node.op == "Div" else 1 / root) else None

    def _factors(self, name: str) -> list[str]:
        """`name`, or x and ½ where it is their product."""
        node = self.makers.get(name)
        is_half = (
            node is not None
            and node.op == "Mul"
            and any(self._is(each, 0.5) for each in node.inputs)
        )
        return list(node.inputs) if node is not None and is_half else [name]

    def _layer_norm(self, root: OnnxNode) -> OnnxNode | None:
        """(x − mean) / √(mean((x − mean)²) + ε) · w + b over the last axis. arXiv:1607.06450."""
        shifted = self.makers.get(root.inputs[0])
        if shifted is None or shifted.op != "Add":
            return None
        variance, eps = shifted.inputs
        square = self._averaged(variance)
        centered = self._squared(square) if square else None
        if centered is None or self._number(eps) is None:
            return None
        x = centered.inputs[0]
        if self._averaged(centered.inputs[1]) != x:
            return None
        quotient = self._reader(root.outputs[0], "Div")
        if quotient is None or quotient.inputs[1] != root.outputs[0]:
            return None
        numerator = self.makers.get(quotient.inputs[0])
        if numerator is None or not self._is_same(numerator, centered):
            return None
        scaled = self._reader(quotient.outputs[0], "Mul")
        summed = self._reader(scaled.outputs[0], "Add") if scaled is not None else None
        if scaled is None or summed is None:
            return None
        weight, bias = self._other(scaled, quotient), self._other(summed, scaled)
        if not all(self._is_row(name) for name in (weight, bias)):
            return None
        attributes = {"axis": -1, "epsilon": self._number(eps)}
        inputs = (x, weight, bias)
        name = scaled.name  # the path of the norm in the TorchScript exporter's names
        return OnnxNode("LayerNormalization", name, inputs, summed.outputs, attributes, "")

    def _averaged(self, name: str) -> str | None:
        """What a mean over the last axis is of."""
        node = self.makers.get(name)
        if node is None or node.op != "ReduceMean" or node.attributes.get("keepdims", 1) != 1:
            return None
        axes = node.attributes.get("axes")
        if len(node.inputs) > 1 and node.inputs[1] in self.constants:
            axes = self.constants[node.inputs[1]].tolist()
        return node.inputs[0] if axes == [-1] else None

    def _squared(self, name: str) -> OnnxNode | None:
        """The subtraction whose result is squared."""
        node = self.makers.get(name)
        if node is None:
            return None
        is_square = (node.op == "Pow" and self._is(node.inputs[1], 2.0)) or (
            node.op == "Mul" and node.inputs[0] == node.inputs[1]
        )
        inner = self.makers.get(node.inputs[0])
        return inner if is_square and inner is not None and inner.op == "Sub" else None

    def _is_same(self, a: OnnxNode, b: OnnxNode) -> bool:
        return a.outputs == b.outputs or (a.op == b.op and a.inputs == b.inputs)

    def _is_row(self, name: str) -> bool:
        return name in self.constants and self.constants[name].ndim == 1

    def _reader(self, name: str, op: str) -> OnnxNode | None:
        """The one node that reads a value, if it is of this kind."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and readers[0].op == op else None

    def _other(self, node: OnnxNode, maker: OnnxNode) -> str:
        first, second = node.inputs
        return second if first == maker.outputs[0] else first

    def _number(self, name: str) -> float | None:
        tensor = self.constants.get(name)
        return float(tensor) if tensor is not None and tensor.numel() == 1 else None

    def _is(self, name: str, wanted: float) -> bool:
        number = self._number(name)
        return number is not None and math.isclose(number, wanted, rel_tol=TOLERANCE)
