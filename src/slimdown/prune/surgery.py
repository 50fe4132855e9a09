"""Taking channels out: slices of the state, and the constants of the graph that tell sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from slimdown.capture import Analysis
from slimdown.capture.call import Edit, arguments_of
from slimdown.capture.dims import Dim, Kept, kept_size
from slimdown.capture.trainable import TrainableGraph
from slimdown.prune.plan import Slices, slices_of


def prune_graph(analysis: Analysis, kept: Kept) -> GraphModule:
    """Return the analyzed graph without the channels that are not kept; it shares no tensor."""
    # The tensors are shared at first: what is about to be sliced need not be copied whole.
    shared = {id(tensor): tensor for tensor in map(analysis.tensor, analysis.tensors)}
    pruned = TrainableGraph.adopt(copy.deepcopy(analysis.graph_module, dict(shared)))
    twins = dict(zip(analysis.graph_module.graph.nodes, pruned.graph.nodes, strict=True))
    for edit, arguments in changed_arguments(analysis, kept):
        _rewrite_(twins[edit.node], edit, arguments, twins)
    for node in pruned.graph.nodes:
        node.meta.pop("val", None)  # the shapes that it tells are no longer true
    slices = slices_of(analysis, kept)
    slice_tensors_(pruned, {name: slices.get(name, {}) for name in analysis.tensors})
    pruned.graph.lint()
    pruned.recompile()
    return pruned


def changed_arguments(analysis: Analysis, kept: Kept) -> list[tuple[Edit, dict[str, Any]]]:
    """The edits that change something, each with the arguments that are new."""
    size = size_after(kept)
    changes: list[tuple[Edit, dict[str, Any]]] = []
    for edit in analysis.edits:
        before, after = edit.arguments(lambda dim: dim.size), edit.arguments(size)
        changed = {name: value for name, value in after.items() if value != before[name]}
        if changed:
            changes.append((edit, dict(after) if edit.target is not None else changed))
    return changes


def size_after(kept: Kept) -> Callable[[Dim], int]:
    """How many channels of a dim are left."""
    widths = {leaf: int(chosen.sum()) for leaf, chosen in kept.items()}
    return lambda dim: kept_size(dim, widths)


def _rewrite_(
    node: Node, edit: Edit, arguments: Mapping[str, Any], twins: Mapping[Node, Node]
) -> None:
    new = {name: map_arg(value, lambda old: twins[old]) for name, value in arguments.items()}
    if edit.target is None:
        new = {**arguments_of(node), **new}
    else:
        node.target = edit.target
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    node.args = tuple(new[a.name] for a in schema if not a.kwarg_only)
    node.kwargs = {a.name: new[a.name] for a in schema if a.kwarg_only}


def slice_tensors_(module: nn.Module, slices: Slices) -> None:
    """Replace parameters, buffers and constants by their kept slices, under all their names."""
    sliced: dict[int, Tensor] = {}
    for name, axes in slices.items():
        whole = attrgetter(name)(module)
        sliced[id(whole)] = _slice_like(whole, axes)
    for owner in module.modules():
        stores: list[dict[str, Any]] = [owner._parameters, owner._buffers, owner.__dict__]
        for store in stores:
            for name, value in store.items():
                if id(value) in sliced:
                    store[name] = sliced[id(value)]


def slice_tensor(tensor: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The kept indices of each axis; a copy."""
    tensor = tensor.detach().clone() if not axes else tensor.detach()
    for axis, kept in axes.items():
        tensor = tensor.index_select(axis, torch.tensor(kept, device=tensor.device))
    return tensor.contiguous()


def _slice_like(whole: Tensor, axes: Mapping[int, tuple[int, ...]]) -> Tensor:
    part = slice_tensor(whole, axes)
    if isinstance(whole, nn.Parameter):
        return nn.Parameter(part, requires_grad=whole.requires_grad)
    return part
