"""Taking blocks and branches out of a user's own module: what stands in their places is empty.

Which modules those are is told by the graph: a block that reads no tensor any more once its
branches are bypassed, or else the modules that only a branch ran. Every replacement is judged by
the graph without the branches: it must compute the same, and be trainable.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.capture.call import module_of
from slimdown.prune.delivery.deliver import train_once
from slimdown.prune.depth.branches import Branch, alive_nodes, bypass
from slimdown.prune.probe import Probe, relative_error
from slimdown.prune.verify import TOLERANCE

Kind: TypeAlias = Literal["identity", "pass", "nothing", "pass_pair", "nothing_pair"]


class Pass(nn.Module):
    """In the place of a removed block that is called with more than its input: gives that back."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Nothing(nn.Module):
    """At the end of a removed branch: a zero for the sum that the branch was part of."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros((), dtype=x.dtype, device=x.device)


class PassPair(Pass):
    """For an attention that returns its weights, too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class NothingPair(Nothing):
    """For an attention that returns its weights, too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


KINDS: dict[Kind, type[nn.Module]] = {
    "identity": nn.Identity,
    "pass": Pass,
    "nothing": Nothing,
    "pass_pair": PassPair,
    "nothing_pair": NothingPair,
}


def replace_modules(model: nn.Module, replaced: Mapping[str, Kind]) -> nn.Module:
    """A copy of `model` in eval mode with modules replaced by such as have no parameters."""
    result = copy.deepcopy(model).eval()
    for name, kind in replaced.items():
        owner, _, attribute = name.rpartition(".")
        result.get_submodule(name)  # raises where there is none
        setattr(result.get_submodule(owner), attribute, KINDS[kind]().eval())
    return result


def find_replacements(
    model: nn.Module, graph_module: GraphModule, branches: Sequence[Branch], probe: Probe
) -> dict[str, Kind] | None:
    """Modules of `model` whose replacement removes the branches; None where there are none such.

    Tried module by module, each against the graph without the branches so far; first all at once.
    """
    if isinstance(model, GraphModule):
        return None
    ordered = sorted(branches, key=lambda branch: branch.module)
    groups = [list(group) for _, group in groupby(ordered, key=lambda branch: branch.module)]
    pairs = _find_pairs(model, probe)
    options = [list(_options(model, graph_module, branches, group, pairs)) for group in groups]
    if not all(options):
        return None
    boldest = {name: kind for first, *_ in options for name, kind in first.items()}
    if not _tell_refusal(model, boldest, bypass(graph_module, branches), probe):
        return boldest
    replaced: dict[str, Kind] = {}
    done: list[Branch] = []
    for group, several in zip(groups, options, strict=True):
        done += group
        oracle = bypass(graph_module, done)
        fits = (
            option
            for option in several
            if not _tell_refusal(model, replaced | option, oracle, probe)
        )
        if (option := next(fits, None)) is None:
            return None
        replaced |= option
    return replaced


def _tell_refusal(
    model: nn.Module, replaced: Mapping[str, Kind], oracle: GraphModule, probe: Probe
) -> str:
    """Why a model with modules replaced cannot be delivered, "" if it can."""
    try:
        module = replace_modules(model, replaced)
        for each in (probe, _with_one_more(probe)):
            error = relative_error(each.outputs(module), each.outputs(oracle))
            if not error <= TOLERANCE:
                return f"the edited module differs from the shallow graph by {error:.1e} (relative)"
        return train_once(module, probe.inputs[0])
    except Exception as failure:  # the user's own code, called with what it was not written for
        return f"{type(failure).__name__}: {failure}"


def _with_one_more(probe: Probe) -> Probe:
    """A probe of another batch size, where one batch holds several samples.

    A batch of two can be taken for a pair, `y, _ = module(x)`, which goes wrong with any other.
    """
    inputs = tuple(torch.cat([x, x[:1]]) if len(x) > 1 else x for x in probe.inputs)
    return replace(probe, inputs=inputs)


def _find_pairs(model: nn.Module, probe: Probe) -> set[str]:
    """The modules of which each call returns two values."""
    watched = copy.deepcopy(model).eval()
    found: dict[str, bool] = {}

    def look(name: str, output: Any) -> None:
        found[name] = found.get(name, True) and isinstance(output, tuple) and len(output) == 2

    for name, module in watched.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: look(name, output))
    probe.outputs(watched)
    return {name for name, is_pair in found.items() if is_pair}


def _options(
    model: nn.Module,
    graph_module: GraphModule,
    branches: Sequence[Branch],
    group: Sequence[Branch],
    pairs: Set[str],
) -> Iterator[dict[str, Kind]]:
    """Ways to remove the branches that one module adds: the module itself, or what it calls.

    `pairs` are the modules that return two values.
    """
    name = group[0].module
    shortcuts = {branch.addition: branch.shortcut for branch in branches}
    alive = alive_nodes(graph_module, shortcuts) - shortcuts.keys()
    if name and not any(_reads_tensor(node) for node in _nodes_of(graph_module, name) & alive):
        yield {name: "identity"}
        yield {name: "pass"}
    found: dict[str, Kind] = {}
    for branch in group:
        children = _dead_modules(model, graph_module, name, {branch.addition: branch.shortcut})
        if not children:
            return
        found |= {child: "pass_pair" if child in pairs else "identity" for child in children}
        last = children[-1]
        found[last] = "nothing_pair" if last in pairs else "nothing"
    yield found


def _dead_modules(
    model: nn.Module, graph_module: GraphModule, within: str, shortcuts: Mapping[Node, Node]
) -> list[str]:
    """The largest modules inside of `within` that nothing needs any more, in the graph's order."""
    alive = alive_nodes(graph_module, shortcuts)
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    prefix = f"{within}." if within else ""
    found: dict[str, int] = {}
    for name, _ in model.named_modules():
        if not name or not name.startswith(prefix) or any(_is_in(name, each) for each in found):
            continue
        nodes = _nodes_of(graph_module, name)
        if nodes and not nodes & alive:
            found[name] = max(order[node] for node in nodes)
    return sorted(found, key=found.__getitem__)


def _nodes_of(graph_module: GraphModule, name: str) -> set[Node]:
    """The operators that a module's forward ran, in it or below."""
    return {
        node
        for node in graph_module.graph.nodes
        if node.op == "call_function" and _is_in(module_of(node), name)
    }


def _is_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _reads_tensor(node: Node) -> bool:
    return any(source.op == "get_attr" for source in node.all_input_nodes)
