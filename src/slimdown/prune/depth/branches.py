"""Residual branches: what a network adds to a value that also passes by.

    shortcut ──┬──────────────────► add ──►          the block of a ResNet, the attention or the
               └──► f(shortcut) ──►                  MLP of a transformer, the bottleneck of a C2f

Found in the graph, whatever the modules are called. To bypass a branch is to let the shortcut
take the place of the sum; what only the branch needed is then dead and goes, weights included.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.capture.call import module_of
from slimdown.prune.probe import Replay

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One sum `shortcut + f(shortcut)` of a graph."""

    name: str
    """The module whose forward adds; with "/1", "/2", … where it adds several."""
    module: str
    addition: Node = field(repr=False)
    shortcut: Node = field(repr=False)
    layers: tuple[str, ...]
    """The modules whose tensors nothing but the branch reads."""


def find_branches(graph_module: GraphModule) -> tuple[Branch, ...]:
    """All branches with weights of their own, in the order of the graph."""
    shortcuts: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if (shortcut := _shortcut_of(node, shortcuts)) is not None:
            shortcuts[node] = shortcut
    found = []
    for addition, shortcut in shortcuts.items():
        alive = alive_nodes(graph_module, {addition: shortcut})
        dead = {_owner(node) for node in _tensors(graph_module) if node not in alive}
        layers = tuple(dict.fromkeys(filter(None, dead)))
        if layers:
            found.append((module_of(addition), addition, shortcut, layers))
    counts, seen = Counter(module for module, *_ in found), Counter[str]()
    branches = []
    for module, addition, shortcut, layers in found:
        seen[module] += 1
        name = module if counts[module] == 1 else f"{module}/{seen[module]}"
        branches.append(
            Branch(name=name, module=module, addition=addition, shortcut=shortcut, layers=layers)
        )
    return tuple(branches)


def _shortcut_of(addition: Node, known: Mapping[Node, Node]) -> Node | None:
    """The operand of a sum that the other one is computed from; None where that is neither.

    Computed from it alone, or from what the shortcut itself is a sum of: parallel branches.
    """
    if addition.target not in _ADDITIONS or addition.kwargs.get("alpha", 1) != 1:
        return None
    a, b = addition.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node):
        return None
    for shortcut, branch in ((a, b), (b, a)):
        if _shape(shortcut) != _shape(addition) or _shape(branch) != _shape(addition):
            continue
        stream = {shortcut}
        upper: Node | None = shortcut
        while (upper := known.get(upper) if upper is not None else None) is not None:
            stream.add(upper)
        if branch not in stream and _is_made_of(branch, stream):
            return shortcut
    return None


def _is_made_of(value: Node, stream: set[Node]) -> bool:
    """Whether nothing but weights, sizes and `stream` is needed to compute a value."""
    waiting, seen, meets_stream = [value], {value}, False
    while waiting:
        node = waiting.pop()
        if node in stream:
            meets_stream = True
            continue
        if node.op == "placeholder":
            return False
        for source in node.all_input_nodes:
            is_size = source.op == "call_function" and not _holds_tensors(source)
            if source not in seen and not is_size:
                seen.add(source)
                waiting.append(source)
    return meets_stream


def alive_nodes(graph_module: GraphModule, shortcuts: Mapping[Node, Node]) -> set[Node]:
    """The nodes that the outputs still need when each sum in `shortcuts` is its shortcut instead.

    Among them the sums themselves, which pass their shortcut on.
    """
    nodes = list(graph_module.graph.nodes)
    alive: set[Node] = {node for node in nodes if node.op in ("placeholder", "output")}
    changed = True
    while changed:
        for node in reversed(nodes):
            if node in alive:
                source = shortcuts.get(node)
                alive.update(node.all_input_nodes if source is None else (source,))
        # What writes into a value that is still needed stays, too.
        writers = {
            node
            for node in nodes
            if node not in alive and _writes(node) and node.all_input_nodes[0] in alive
        }
        writers -= shortcuts.keys()
        alive |= writers
        changed = bool(writers)
    return alive


def bypass(graph_module: GraphModule, branches: Iterable[Branch]) -> GraphModule:
    """Return the graph without `branches` and without the tensors that only they read."""
    shortcuts = {branch.addition: branch.shortcut for branch in branches}
    alive = alive_nodes(graph_module, shortcuts)
    result = copy.deepcopy(graph_module)
    twins = dict(zip(graph_module.graph.nodes, result.graph.nodes, strict=True))
    for addition, shortcut in shortcuts.items():
        while shortcut in shortcuts:
            shortcut = shortcuts[shortcut]
        value = twins[shortcut]
        if any(_writes(user) and user in alive for user in addition.users):
            with result.graph.inserting_before(twins[addition]):
                value = result.graph.call_function(torch.ops.aten.clone.default, (value,))
            value.meta = dict(twins[addition].meta)
        twins[addition].replace_all_uses_with(value)
    for node in reversed(list(twins)):
        if node not in alive or node in shortcuts:
            result.graph.erase_node(twins[node])
    _drop_tensors_(result, before=graph_module)
    result.graph.lint()
    result.recompile()
    return result


def _drop_tensors_(result: GraphModule, *, before: GraphModule) -> None:
    """Remove the tensors that are read no more, and those beside them, such as counters."""
    names = {str(node.target) for node in _tensors(result)}
    gone = {str(node.target) for node in _tensors(before)} - names
    owners = {_owner_of(name) for name in gone} - {_owner_of(name) for name in names} - {""}
    for name, _ in [*result.named_parameters(), *result.named_buffers()]:
        owner, _, tensor = name.rpartition(".")
        if name in gone or owner in owners:
            delattr(result.get_submodule(owner), tensor)


class Bypassed(Replay):
    """Runs a whole graph as if some branches were not there: the reference for what removes them.

    Where `state` has no tensor of a name, the graph's own is taken.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        branches: Iterable[Branch],
        state: Mapping[str, Tensor] | None = None,
        *,
        double: bool = False,
    ) -> None:
        super().__init__(graph_module, state or {}, double=double)
        self.shortcuts = {branch.addition: branch.shortcut for branch in branches}
        self.alive = alive_nodes(graph_module, self.shortcuts)

    def run_node(self, n: Node) -> Any:
        if n not in self.alive:
            return None
        if n in self.shortcuts:  # a copy: what follows may write into it
            return self.env[self.shortcuts[n]].clone()
        return super().run_node(n)


def _tensors(graph_module: GraphModule) -> list[Node]:
    return list(graph_module.graph.find_nodes(op="get_attr"))


def _owner(node: Node) -> str:
    return _owner_of(str(node.target))


def _owner_of(name: str) -> str:
    return name.rpartition(".")[0]


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _holds_tensors(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | list | tuple)


def _writes(node: Node) -> bool:
    """Whether an operator changes its first argument in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
