"""What a captured graph says of its dimensions: the op table applied, node by node."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture.call import (
    BATCH,
    KERNEL,
    SPATIAL,
    Call,
    Edit,
    Layer,
    Shape,
    Unsupported,
    operator_name,
    sizes_of,
)
from slimdown.capture.dims import Dim, Kept, Var, freeze_, is_frozen, kept_size, leaves
from slimdown.capture.numbers import find_shared_numbers
from slimdown.capture.ops import find_rule

NO_CHANNELS = frozenset({BATCH, SPATIAL, KERNEL})
"""Reasons of frozen dims that nobody would prune; reports leave them out."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The dims of every tensor of `graph_module`, and what pruning it must change."""

    graph_module: GraphModule
    shapes: Mapping[Node, Shape]
    tensors: Mapping[str, Shape]
    """By the state's names (all of them, where tensors are tied): what the graph reads."""
    edits: tuple[Edit, ...]
    costs: tuple[Shape, ...]
    """One product of dims for every operator that multiplies and accumulates."""
    layers: tuple[Layer, ...]
    """In the order of the graph."""
    ties: tuple[Shape, ...]
    """Dims that had better keep equal sizes: see `Call.tie`."""
    spared: tuple[Dim, ...]
    """Dims that had better stay whole: see `Call.spare`."""
    mixing: frozenset[Node]
    """Calls that see the kept channels only: see `Call.mix`."""
    batch_size: int
    """Of the captured example."""

    def tensor(self, name: str) -> Tensor:
        return find_tensor(self.graph_module, name)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The graph module's parameters, tied ones once."""
        return dict(self.graph_module.named_parameters())

    @cached_property
    def channels(self) -> tuple[Var, ...]:
        """Every leaf that is a channel of some tensor of the state, in the graph's order."""
        found: dict[Var, None] = {}
        for shape in self.tensors.values():
            for dim in shape:
                found.update(dict.fromkeys(leaves(dim)))
        return tuple(leaf for leaf in found if leaf.size > 1 and leaf.reason not in NO_CHANNELS)

    def count_macs(self, widths: Mapping[Var, int]) -> int:
        """Multiply-accumulates of one sample, each leaf at its given width or else its own."""
        total = sum(_volume(dims, widths) for dims in self.costs)
        return total // self.batch_size

    def count_parameters(self, widths: Mapping[Var, int]) -> int:
        """The values of all parameters, each leaf at its given width or else its own."""
        return sum(
            _volume(self.tensors[name], widths) if name in self.tensors else parameter.numel()
            for name, parameter in self.parameters.items()
        )

    def at_batch_size(self, kept: Kept, batch_size: int) -> Kept:
        """The same choice for tensors of another batch size than that of the captured example.

        The dim of windows or heads that are folded into the batch is as long as the batch is.
        """
        shapes = chain(self.shapes.values(), self.tensors.values())
        batch = {leaf for shape in shapes for dim in shape for leaf in leaves(dim)}
        return {
            **kept,
            **{
                leaf: torch.ones(leaf.size // self.batch_size * batch_size, dtype=torch.bool)
                for leaf in batch
                if leaf.reason == BATCH and leaf.size % self.batch_size == 0
            },
        }

    def frozen_shares(self) -> dict[str, float]:
        """For each reason, the share of the parameters in channels that it keeps.

        Those of a tensor count along the axis that the reason freezes most of. A parameter counts
        for each of several reasons, and may still be removed along another axis.
        """
        total = sum(parameter.numel() for parameter in self.parameters.values())
        shares: dict[str, float] = {}
        for name, parameter in self.parameters.items():
            for reason, fraction in _frozen_fractions(self.tensors.get(name, ())).items():
                shares[reason] = shares.get(reason, 0.0) + fraction * parameter.numel() / total
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def analyze(graph_module: GraphModule) -> Analysis:
    """Find the dims of every tensor of a captured graph, which is left as it was.

    Inputs and outputs keep all their channels; so does whatever an operator touches that the op
    table does not know.
    """
    walk = _Walk(graph_module)
    for node in graph_module.graph.nodes:
        walk.visit(node)
    return Analysis(
        graph_module=graph_module,
        shapes=walk.shapes,
        tensors=walk.tensors,
        edits=tuple(walk.edits),
        costs=tuple(walk.costs),
        layers=tuple(walk.layers),
        ties=(*walk.ties, *find_shared_numbers(walk.shapes)),
        spared=tuple(walk.spared),
        mixing=frozenset(walk.mixing),
        batch_size=walk.batch_size,
    )


class _Walk:
    """One pass over a graph in its order."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.shapes: dict[Node, Shape] = {}
        self.several: dict[Node, list[Shape]] = {}
        self.tensors: dict[str, Shape] = {}
        self.edits: list[Edit] = []
        self.costs: list[Shape] = []
        self.layers: list[Layer] = []
        self.ties: list[Shape] = []
        self.spared: list[Dim] = []
        self.mixing: list[Node] = []
        self.batch_size = 1
        self._names = _names_of_tensors(graph_module)

    def visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self._visit_input(node)
        elif node.op == "get_attr":
            self._visit_tensor(node)
        elif node.op == "output":
            self._freeze_inputs(node, "output")
        elif node.target is operator.getitem:
            self._visit_item(node)
        elif node.target is torch.ops.aten.sym_size.int:
            self._visit_size(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            self._visit_call(node)
        else:  # arithmetic on sizes that depend on the batch, or a call of Python
            self._freeze_inputs(node, str(node.target))
            self._set_frozen(node, str(node.target))

    def _visit_input(self, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.ndim > 0:
            self.batch_size, *rest = sizes_of(value)
            self.shapes[node] = (Var(self.batch_size, BATCH), *(Var(n, "input") for n in rest))

    def _visit_tensor(self, node: Node) -> None:
        name = str(node.target)
        tensor = attrgetter(name)(self.graph_module)
        if not isinstance(tensor, Tensor):
            return  # the body of a higher-order operator, such as one under autocast
        if name not in self.tensors:
            names = self._names.get(id(tensor), [name])
            self.tensors.update(dict.fromkeys(names, tuple(map(Var, tensor.shape))))
        self.shapes[node] = self.tensors[name]

    def _visit_item(self, node: Node) -> None:
        source, position = node.args
        assert isinstance(source, Node)
        if source in self.several and isinstance(position, int):
            self.shapes[node] = self.several[source][position]
        else:
            self._set_frozen(node, "getitem")

    def _visit_size(self, node: Node) -> None:
        """A size that the graph computes with; one that it does not know is that of the batch."""
        source, axis = node.args
        shape = self.shapes.get(source, ()) if isinstance(source, Node) else ()
        if shape and isinstance(axis, int):
            freeze_(shape[axis], BATCH)

    def _visit_call(self, node: Node) -> None:
        rule = find_rule(node)
        call = Call(node, self.shapes)
        try:
            if rule is None or not self._has_output(node):
                raise Unsupported
            output = rule(call)
        except Unsupported:
            reason = operator_name(node)
            self._freeze_inputs(node, reason)
            self._set_frozen(node, reason)
            return
        if isinstance(output, list):
            self.several[node] = output
        else:
            self.shapes[node] = output
        self.edits += call.edits
        self.costs += call.costs
        self.layers += call.layers
        self.ties += call.ties
        self.spared += call.spared
        self.mixing += [node] if call.mixes_channels else []

    def _has_output(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), Tensor | list | tuple)

    def _freeze_inputs(self, node: Node, reason: str) -> None:
        for source in node.all_input_nodes:
            for shape in (self.shapes.get(source, ()), *self.several.get(source, ())):
                for dim in shape:
                    freeze_(dim, reason)

    def _set_frozen(self, node: Node, reason: str) -> None:
        """Give the node's outputs dims of their own; none where a size depends on values."""
        value = node.meta.get("val")
        with suppress(Unsupported):
            if isinstance(value, Tensor):
                self.shapes[node] = _frozen(value, reason)
            elif isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value):
                self.several[node] = [_frozen(each, reason) for each in value]


def _names_of_tensors(graph_module: GraphModule) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its id: tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in chain(
        graph_module.named_parameters(remove_duplicate=False),
        graph_module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return names


def find_tensor(graph_module: GraphModule, name: str) -> Tensor:
    """A parameter, buffer or constant by its dotted name."""
    tensor = attrgetter(name)(graph_module)
    assert isinstance(tensor, Tensor), name
    return tensor


def _frozen(tensor: Tensor, reason: str) -> Shape:
    return tuple(Var(size, reason) for size in sizes_of(tensor))


def _frozen_fractions(shape: Shape) -> dict[str, float]:
    """For each reason, how much can never go of the axis that it freezes most of."""
    fractions: dict[str, float] = {}
    for dim in (dim for dim in shape if dim.size > 1):
        free = {leaf: 0 for leaf in leaves(dim) if not is_frozen(leaf)}
        for reason in {leaf.reason for leaf in leaves(dim) if leaf.reason} - NO_CHANNELS:
            own = {leaf: 0 for leaf in leaves(dim) if leaf.reason == reason}
            frozen = kept_size(dim, free) - kept_size(dim, {**free, **own})
            if frozen:
                fractions[reason] = max(fractions.get(reason, 0.0), frozen / dim.size)
    return fractions


def _volume(dims: Shape, widths: Mapping[Var, int]) -> int:
    volume = 1
    for dim in dims:
        volume *= kept_size(dim, widths)
    return volume
