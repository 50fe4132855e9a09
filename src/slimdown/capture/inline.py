"""Regions under `torch.no_grad` or `torch.autocast`, put into the graph that they are a part of.

torch.export makes the body of such a region a graph of its own, which nothing that works on the
graph would look into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
"""(enabled, body, *operands)"""
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
"""(device type, dtype, enabled, cache enabled, body, *operands)"""


def inline_regions_(graph_module: GraphModule) -> None:
    """Put the body of each region in its place, between two calls that switch the mode.

    What the graph computes, in which precision and with which gradients, stays the same. A body
    with tensors of its own stays where it is, and so does one that autocast is on for: exported
    once more, it would be traced without.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in (_NO_GRAD, _AUTOCAST):
            continue
        first = 1 if node.target is _NO_GRAD else 4
        mode, body, operands = node.args[:first], node.args[first], node.args[first + 1 :]
        module = graph_module.get_submodule(str(body.target))
        assert isinstance(module, GraphModule)
        inline_regions_(module)
        has_tensors = any(each.op == "get_attr" for each in module.graph.nodes)
        is_autocast = node.target is _AUTOCAST and mode[2]
        if not has_tensors and not is_autocast:
            _inline_(graph_module.graph, node, mode, module.graph, operands)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _inline_(
    graph: Graph, node: Node, mode: tuple[Any, ...], body: Graph, operands: tuple[Any, ...]
) -> None:
    inputs = (each for each in body.nodes if each.op == "placeholder")
    twins: dict[Node, Any] = dict(zip(inputs, operands, strict=True))
    with graph.inserting_before(node):
        if node.target is _NO_GRAD:
            before = graph.call_function(torch.is_grad_enabled)
            graph.call_function(torch._C._set_grad_enabled, mode)
        else:
            before = graph.call_function(torch.amp.autocast_mode._enter_autocast, mode)
        result = graph.graph_copy(body, twins)
        if node.target is _NO_GRAD:
            graph.call_function(torch._C._set_grad_enabled, (before,))
        else:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (before,))
    _replace_(graph, node, result)


def _replace_(graph: Graph, node: Node, result: Any) -> None:
    """Let what reads a region's outputs, one by one, read those of its body."""
    for user in list(node.users):
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
