"""Batch-norm folding: an inference-time batch norm is a scale and a shift of the layer before it.

gamma (w ∗ x + b - mean) / sqrt(variance + eps) + beta  =  (k w) ∗ x + k (b - mean) + beta
with k = gamma / sqrt(variance + eps)               Jacob 2018, arXiv:1712.05877, section 3.2
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.quantize.families import LAYERS, family_of

aten = torch.ops.aten


class Norm(NamedTuple):
    """The state of a batch norm, each tensor (C,); gamma and beta are None if it is not affine."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float


def fold_norm(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The weight (C_out, ...) and bias (C_out,) of a layer that absorbs the norm behind it."""
    gain = (norm.variance.double() + norm.eps).rsqrt()
    if norm.gamma is not None:
        gain = gain * norm.gamma.double()
    shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
    shift = gain * shift if norm.beta is None else gain * shift + norm.beta.double()
    scaled = weight.double() * gain.view(-1, *[1] * (weight.ndim - 1))
    return scaled.to(weight.dtype), shift.to(weight.dtype)


def fold_batch_norms(graph_module: GraphModule) -> GraphModule:
    """Return the graph with each batch norm folded into the layer that feeds nothing but it.

    A norm behind another operator, or behind a layer that others read too, stays. Tensors that are
    not folded are shared with `graph_module`.
    """
    graph = copy.deepcopy(graph_module.graph)
    attributes = attributes_of(graph_module)
    for norm_node in graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        layer = _layer_before(norm_node)
        if layer is None:
            continue
        weight, bias = (_read(attributes, argument) for argument in layer_tensors(layer))
        gamma, beta, mean, variance = (_read(attributes, value) for value in norm_node.args[1:5])
        assert weight is not None
        assert mean is not None
        assert variance is not None
        norm = Norm(gamma, beta, mean, variance, eps=norm_node.args[7])
        prefix = _free_prefix(layer, attributes)
        folded = [
            (f"{prefix}{name}", nn.Parameter(tensor))
            for name, tensor in zip(("weight", "bias"), fold_norm(weight, bias, norm), strict=True)
        ]
        attributes.update(folded)
        with graph.inserting_before(layer):
            layer.args = (layer.args[0], *(graph.get_attr(p) for p, _ in folded), *layer.args[3:])
        norm_node.replace_all_uses_with(layer)
        graph.erase_node(norm_node)
    graph.eliminate_dead_code()
    return GraphModule(attributes, graph)


def attributes_of(graph_module: GraphModule) -> dict[str, Tensor | nn.Module]:
    """The tensors and modules that the graph names, by their dotted path."""
    attributes = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            attributes[node.target] = getattr(graph_module.get_submodule(owner), name)
        elif node.op == "call_module":
            attributes[node.target] = graph_module.get_submodule(node.target)
    return attributes


def count_uses(graph_module: GraphModule) -> Counter[int]:
    """How many nodes read each tensor, by its id: tied ones have several names."""
    attributes = attributes_of(graph_module)
    uses: Counter[int] = Counter()
    for node in graph_module.graph.find_nodes(op="get_attr"):
        uses[id(attributes[str(node.target)])] += len(node.users)
    return uses


def layer_tensors(layer: Node) -> tuple[Node, Node | None]:
    """The nodes of a layer's weight and bias."""
    weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight, Node)
    assert bias is None or isinstance(bias, Node)
    return weight, bias


def _layer_before(norm: Node) -> Node | None:
    """The layer that a batch norm can be folded into."""
    layer = norm.args[0]
    if not isinstance(layer, Node) or family_of(layer) not in LAYERS or len(layer.users) > 1:
        return None
    if norm.args[3] is None or norm.args[5]:  # no running statistics, or in training mode
        return None
    tensors = (*layer_tensors(layer), *norm.args[1:5])
    if any(isinstance(node, Node) and node.op != "get_attr" for node in tensors):
        return None
    # A linear's (N, L, C) output meets a norm over L, which is not its channel axis.
    is_sequence = layer.target is aten.linear.default and layer.meta["val"].ndim != 2
    return None if is_sequence else layer


def _read(attributes: dict[str, Tensor | nn.Module], node: Node | None) -> Tensor | None:
    if node is None:
        return None
    tensor = attributes[str(node.target)]
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _free_prefix(layer: Node, attributes: dict[str, Tensor | nn.Module]) -> str:
    """Where the folded tensors go: the layer's own place, or a new one if others read from it."""
    weight, bias = layer_tensors(layer)
    prefix = str(weight.target).removesuffix("weight")
    own = {str(node.target) for node in (weight, bias) if node is not None}
    shared = [
        node
        for node in layer.graph.find_nodes(op="get_attr")
        if node.target in own and set(node.users) != {layer}
    ]
    is_own_place = own == {f"{prefix}weight", f"{prefix}bias"} & attributes.keys()
    return prefix if is_own_place and not shared else f"{layer.name}_"
