"""Which channels go first: importance made comparable between the groups that compete.

Who competes is the scope:

    global      all groups, so that what matters little goes wherever it is
    isomorphic  only groups that are built alike: Fang 2024, arXiv:2407.04616
    local       none: every group keeps the same share, but for what is left of the budget

"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from slimdown.capture import Analysis
from slimdown.capture.call import operator_name
from slimdown.capture.dims import Cat, Dim, Var, leaves, resolve
from slimdown.prune.groups import group_channels

Scope: TypeAlias = Literal["global", "isomorphic", "local"]

SCOPE: tuple[Scope, ...] = ("global", "isomorphic", "local")

Unit: TypeAlias = Literal["group", "common", "damage"]
"""How the values of a criterion compare between groups. "group": not at all, they are taken over
their mean in the group. "common": as they are. "damage": as they are, and they add up, so that what
is lost with some channels can be weighed against what their removal saves."""


def over_mean(importance: Tensor) -> Tensor:
    """Importance over its mean in the group, (C,)."""
    return importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)


def rank(
    scores: Mapping[Var, Tensor], analysis: Analysis, *, unit: Unit, scope: Scope
) -> dict[Var, Tensor]:
    """The scores of all groups on one scale, (C,) each.

    Outside of the global scope that scale is a channel's place among its competitors, in (0, 1),
    so that of each set of competitors the same share goes first.
    """
    comparable = {leaf: over_mean(s) if unit == "group" else s for leaf, s in scores.items()}
    if scope == "global":
        return comparable
    kinds: Mapping[Var, Hashable] = outlines(analysis) if scope == "isomorphic" else {}
    competitors: dict[Hashable, list[Var]] = {}
    for leaf in comparable:
        competitors.setdefault(kinds.get(leaf, leaf), []).append(leaf)
    ranked: dict[Var, Tensor] = {}
    for together in competitors.values():
        ranked |= _places({leaf: comparable[leaf] for leaf in together})
    return ranked


def unranked(scores: Mapping[Var, Tensor], analysis: Analysis) -> list[str]:
    """The names of the groups that stay whole because nothing is known of them."""
    groups = group_channels(analysis).items()
    return [group.name for leaf, group in groups if not group.frozen and leaf not in scores]


def _places(scores: Mapping[Var, Tensor]) -> dict[Var, Tensor]:
    """Each channel's place among all of these, in (0, 1); equals come in their order."""
    joined = torch.cat(list(scores.values()))
    order = joined.argsort(stable=True)
    places = torch.empty(len(joined), dtype=torch.float64)
    places[order] = (torch.arange(len(joined), dtype=torch.float64) + 0.5) / len(joined)
    sizes = [len(each) for each in scores.values()]
    return dict(zip(scores, torch.split(places, sizes), strict=True))


def outlines(analysis: Analysis) -> dict[Var, tuple[str, ...]]:
    """How each group is built: the operands that have its channels, whatever their sizes.

    Equal outlines are isomorphic groups: hidden channels of one kind of block, say, in stages of
    any width.
    """
    found: dict[Var, list[str]] = {}
    for node in analysis.graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for index, operand in _tensor_operands(node):
                for axis, dim in enumerate(analysis.tensors.get(str(operand.target), ())):
                    for leaf in dict.fromkeys(leaves(dim)):
                        place = f"{operator_name(node)} {index} {axis} {_outline(dim, leaf)}"
                        found.setdefault(leaf, []).append(place)
    return {leaf: tuple(sorted(places)) for leaf, places in found.items()}


def _tensor_operands(node: Node) -> Iterator[tuple[int, Node]]:
    """The parameters and buffers that an operator takes, each with its place."""
    operands = enumerate(node.all_input_nodes)
    return ((index, operand) for index, operand in operands if operand.op == "get_attr")


def _outline(dim: Dim, leaf: Var) -> str:
    """Where a leaf stands in a dim: "*" alone, "(.x*)" as the inner factor of two, "+" joined."""
    dim = resolve(dim)
    if isinstance(dim, Var):
        return "*" if dim is leaf else "."
    if isinstance(dim, Cat):  # how many others it is joined to makes no difference
        parts = {_outline(part, leaf) for part in dim.parts}
        return f"[{'+'.join(sorted(part for part in parts if '*' in part))}]"
    return f"({'x'.join(_outline(factor, leaf) for factor in dim.factors)})"
