"""The layers of a quantized graph whose weights a refinement may change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.quantize.fake_quantize import FakeQuantizePerChannel
from slimdown.quantize.fold import attributes_of, count_uses, layer_tensors
from slimdown.quantize.placement import Placement, weight_quantizer


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer whose weight is quantized and read by nothing else; its tensors are the graph's."""

    node: Node
    weight_node: Node
    """The quantizer of the weight, in the graph."""
    weight: Tensor
    bias: Tensor | None
    """None also for a bias that others read too."""
    fixed_bias: Tensor | None
    """A bias that others read too."""
    original: Tensor
    """The weight that the float graph has."""
    quantizer: FakeQuantizePerChannel


def find_layers(
    quantized: GraphModule, reference: GraphModule, placement: Placement
) -> dict[Node, Layer]:
    """The layers of `placement` by their nodes; those that share their weight are left out."""
    tensors, originals = attributes_of(quantized), attributes_of(reference)
    uses = count_uses(quantized)
    layers = {}
    for node in quantized.graph.nodes:
        if node.name not in placement.weights:
            continue
        weight_node, bias_node = layer_tensors(node)
        name = str(weight_node.all_input_nodes[0].target)
        weight, original = tensors[name], originals[name]
        bias = None if bias_node is None else tensors.get(str(bias_node.target))
        assert isinstance(weight, Tensor)
        assert isinstance(original, Tensor)
        if uses[id(weight)] > 1:
            continue
        assert bias is None or isinstance(bias, Tensor)
        bias = None if bias is None else bias.detach()
        is_own = bias_node is not None and uses[id(tensors[str(bias_node.target)])] == 1
        layers[node] = Layer(
            node=node,
            weight_node=weight_node,
            weight=weight.detach(),
            bias=bias if is_own else None,
            fixed_bias=None if is_own else bias,
            original=original.detach(),
            quantizer=weight_quantizer(quantized, node.name),
        )
    return layers
