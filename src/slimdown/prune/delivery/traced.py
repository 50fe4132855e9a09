"""Submodules that run as a piece of the pruned graph, inside of the user's own module.

Some code has no number to change: `x.reshape(B, N, C)` with the C of its input, where pruned heads
are together narrower than that. The submodule that holds such code is replaced by its piece of the
pruned graph, under the same name and with the same state; all around it stays the user's own.

A piece is what the graph's nodes say of the module they come from. Which of its inputs is which
argument of the user's `forward`, and what of it the user's code gets back, is found by running
both the module and the graph on the same input: equal tensors are the same thing.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from slimdown.capture import Analysis
from slimdown.capture.call import modules_of
from slimdown.capture.trainable import TrainableGraph
from slimdown.prune.plan import find_tensor
from slimdown.prune.probe import Probe, Replay

_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


class CannotTrace(Exception):
    """A submodule whose piece of the graph cannot stand in for it; the message says why."""


def trace_submodules_(
    module: nn.Module,
    names: Iterable[str],
    *,
    model: nn.Module,
    analysis: Analysis,
    oracle: GraphModule,
    probe: Probe,
) -> None:
    """Replace submodules of `module`, an edited copy of `model`, by their pieces of `oracle`.

    `oracle` is the pruned form of `analysis.graph_module`, node by node, and `probe` that of the
    unpruned network. Raises CannotTrace.
    """
    calls = _record_calls(model, names, probe)
    pieces = {name: _piece(analysis.graph_module, name) for name in calls}
    record = _Record(analysis.graph_module, probe, pieces.values())
    twins = dict(zip(analysis.graph_module.graph.nodes, oracle.graph.nodes, strict=True))
    for name, call in calls.items():
        submodule = module.get_submodule(name)
        writer = _Writer(name, call, pieces[name], record, twins, oracle)
        _replace_(module, submodule, writer.write(submodule))


def _piece(graph_module: GraphModule, name: str) -> list[Node]:
    """The operator calls of one module, in order."""
    nodes = graph_module.graph.nodes
    return [n for n in nodes if n.op == "call_function" and name in modules_of(n)]


def _replace_(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


# ------------------------------------------------------------------------------ what was called


@dataclass(frozen=True)
class _Call:
    """One call of a submodule by the user's code."""

    signature: inspect.Signature
    arguments: Mapping[str, Any]
    output: Any


def _record_calls(model: nn.Module, names: Iterable[str], probe: Probe) -> dict[str, _Call]:
    """How the user's unpruned model calls each of the submodules. Raises CannotTrace."""
    watched = copy.deepcopy(model).eval()
    calls: dict[str, list[_Call]] = {name: [] for name in names}

    def watch(name: str, submodule: nn.Module) -> None:
        signature = inspect.signature(submodule.forward)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            calls[name].append(_Call(signature, bound.arguments, output))

        submodule.register_forward_hook(hook, with_kwargs=True)

    for name in calls:
        watch(name, watched.get_submodule(name))
    probe.first().outputs(watched)
    for name, seen in calls.items():
        if len(seen) != 1:
            raise CannotTrace(f"{name} is called {len(seen)} times")
    return {name: seen[0] for name, seen in calls.items()}


class _Record(Replay):
    """The values of a graph's nodes that enter or leave its pieces, on the probe's first input."""

    def __init__(
        self, graph_module: GraphModule, probe: Probe, pieces: Iterable[Sequence[Node]]
    ) -> None:
        super().__init__(graph_module, probe.state)
        self.wanted = {node for piece in pieces for node in (*_entries(piece), *_exits(piece))}
        self.values: dict[Node, Any] = {}
        self.run(probe.inputs[0])

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def _entries(piece: Sequence[Node]) -> list[Node]:
    inside = set(piece)
    sources = (source for node in piece for source in node.all_input_nodes)
    return list(dict.fromkeys(source for source in sources if source not in inside))


def _exits(piece: Sequence[Node]) -> list[Node]:
    inside = set(piece)
    return [node for node in piece if any(user not in inside for user in node.users)]


# ------------------------------------------------------------------------------ writing a piece


class _Writer:
    """Writes one piece of the pruned graph as a module that is called like the user's."""

    def __init__(
        self,
        name: str,
        call: _Call,
        piece: Sequence[Node],
        record: _Record,
        twins: Mapping[Node, Node],
        oracle: GraphModule,
    ) -> None:
        if not piece:
            raise CannotTrace(f"the graph has no operators of {name}")
        self.name = name
        self.call = call
        self.piece = piece
        self.values = record.values
        self.state = record.state
        self.twins = twins
        self.originals = {twin: node for node, twin in twins.items()}
        self.oracle = oracle
        self.graph = Graph()
        self.copies: dict[Node, Node] = {}
        """Node of the unpruned graph -> node of the piece."""
        self.leaves: list[tuple[Tensor, tuple[Any, ...], Node]] = []
        """Tensors among the arguments, each with its path and the placeholder that it is in."""
        self.attributes: dict[str, Any] = {}

    def write(self, submodule: nn.Module) -> TrainableGraph:
        self._write_placeholders()
        for node in self.piece:
            for twin in self.twins[node].all_input_nodes:
                source = self.originals[twin]
                if source not in self.copies:
                    self.copies[source] = self._enter(source, submodule)
            self.copies[node] = self._copy(node)
        self._write_output()
        self.graph.eliminate_dead_code()
        traced = TrainableGraph(self.attributes, self.graph, type(submodule).__name__)
        _take_over_(traced, submodule)
        return traced.train(submodule.training)

    def _copy(self, node: Node) -> Node:
        """A node of the pruned graph, reading copies of what it read there."""
        return self.graph.node_copy(
            self.twins[node], lambda twin: self.copies[self.originals[twin]]
        )

    def _write_placeholders(self) -> None:
        for parameter in self.call.signature.parameters.values():
            default = parameter.default
            if default is not parameter.empty and not isinstance(default, int | float | str):
                default = None
            node = self.graph.placeholder(
                _STARS.get(parameter.kind, "") + parameter.name, default_value=default
            )
            given = self.call.arguments.get(parameter.name)
            for path, leaf in tree_flatten_with_path(given)[0]:
                if isinstance(leaf, Tensor):
                    self.leaves.append((leaf, path, node))

    def _enter(self, node: Node, submodule: nn.Module) -> Node:
        """What stands in the piece for a node from outside."""
        if node.op == "get_attr":
            return self._enter_attribute(str(node.target), submodule)
        value = self.values[node]
        if isinstance(value, Tensor):
            return self._argument(value)
        if isinstance(value, int):
            return self._enter_size(node, submodule)
        raise CannotTrace(f"{self.name} takes a {type(value).__name__} from outside")

    def _argument(self, value: Tensor) -> Node:
        found = {id(leaf): (path, node) for leaf, path, node in self.leaves if _equal(leaf, value)}
        if len(found) != 1:
            raise CannotTrace(f"{len(found)} arguments of {self.name} could be one of its inputs")
        path, node = next(iter(found.values()))
        for key in path:
            node = self.graph.call_function(operator.getitem, (node, _index(key)))
        return node

    def _enter_attribute(self, target: str, submodule: nn.Module) -> Node:
        value = attrgetter(target)(self.oracle)
        inside = target.removeprefix(f"{self.name}.")
        own = find_tensor(submodule, inside) if inside != target else None
        if own is not None:
            self.attributes[inside] = own
        elif isinstance(value, nn.Parameter):
            return self._argument(self.state[target])
        else:  # a constant of the graph, or the body of a higher-order operator
            inside = f"_{target.replace('.', '_')}"
            self.attributes[inside] = copy.deepcopy(value)
        return self.graph.get_attr(inside)

    def _enter_size(self, node: Node, submodule: nn.Module) -> Node:
        """A size that depends on the batch, read from an argument or computed as outside.

        Where windows are folded into the batch, arguments have a multiple of it.
        """
        expression = node.meta["val"].node.expr
        found: list[tuple[int, int, Node]] = []
        for source in _entries(self.piece):
            value = source.meta.get("val")
            sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
            for axis, size in enumerate(sizes):
                times = None if isinstance(size, int) else size.node.expr / expression
                if times is not None and times.is_Integer:
                    found.append((int(times), axis, source))
        if found:
            times, axis, source = min(found, key=lambda each: each[0])
            if source not in self.copies:
                self.copies[source] = self._enter(source, submodule)
            size_of = torch.ops.aten.sym_size.int
            read = self.graph.call_function(size_of, (self.copies[source], axis))
            return self.graph.call_function(operator.floordiv, (read, times))
        if node.target is torch.ops.aten.sym_size.int:
            raise CannotTrace(f"{self.name} reads a size that none of its arguments has")
        for source in node.all_input_nodes:
            if source not in self.copies:
                self.copies[source] = self._enter_size(source, submodule)
        return self._copy(node)

    def _write_output(self) -> None:
        # A size that is computed inside may be read elsewhere, and is computed there again.
        exits = [node for node in _exits(self.piece) if not isinstance(self.values[node], int)]
        leaves, spec = tree_flatten(self.call.output)
        given: list[Any] = []
        for leaf in leaves:
            match = next((n for n in exits if _equal(self.values[n], leaf)), None)
            passed = next((n for t, path, n in self.leaves if t is leaf and not path), None)
            if match is not None:
                given.append(self.copies[match])
            else:  # what is passed through, or what nobody reads
                given.append(passed if isinstance(leaf, Tensor) else leaf)
        missing = [node for node in exits if self.copies[node] not in given]
        if missing:
            raise CannotTrace(f"{self.name} has an output that its callers do not get")
        self.graph.output(tree_unflatten(given, spec))


def _index(key: Any) -> Any:
    """What a step of a path through tuples, lists and dictionaries is looked up by."""
    return key.idx if hasattr(key, "idx") else key.key


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors are the same thing, computed by the module and by its graph."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one - other).norm() <= 1e-5 * other.norm())


def _take_over_(traced: TrainableGraph, submodule: nn.Module) -> None:
    """Give a traced module the state and plain attributes that its graph does not read."""
    for prefix, owner in submodule.named_modules():
        held = _module_at(traced, prefix)
        for store, register in (
            (owner._parameters, held.register_parameter),
            (owner._buffers, held.register_buffer),
        ):
            for name, tensor in store.items():
                if name not in held._parameters and name not in held._buffers:
                    register(name, tensor)
        kept = owner._non_persistent_buffers_set
        held._non_persistent_buffers_set.update(kept)
    own = {name for name, _ in submodule.named_buffers(recurse=False)}
    constants = {name for name, _ in traced.named_buffers(recurse=False)} - own
    traced._non_persistent_buffers_set.update(constants)
    for name, value in vars(submodule).items():
        if not name.startswith("_") and name not in vars(traced):
            vars(traced)[name] = value


def _module_at(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path, made where it is missing."""
    for name in _parts(path):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        child = module._modules[name]
        assert child is not None
        module = child
    return module


def _parts(path: str) -> Iterator[str]:
    yield from path.split(".") if path else ()
