"""Where fake quantizers stand in a graph: planned by a pure function, then put in.

The plan is data, and it is what a run saves: the same plan on the same graph is the same module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.core import Json
from slimdown.quantize.fake_quantize import FakeQuantizePerChannel, FakeQuantizePerTensor
from slimdown.quantize.families import HEAVY, LAYERS, family_of
from slimdown.quantize.fold import attributes_of, layer_tensors
from slimdown.quantize.profiles import Profile

WEIGHT_AXIS = 0  # of the output channels, in every layer


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The quantizers of a graph, told by the names of its nodes."""

    activations: dict[str, tuple[str, ...]]
    """Producer -> the nodes behind which its one quantizer stands: itself, and moves of it."""
    weights: dict[str, str]
    """Layer whose weight is quantized -> the producer on whose grid its input is."""
    kept_float: dict[str, str]
    """Node that does heavy arithmetic in float -> why."""
    activation_range: tuple[int, int]
    weight_range: tuple[int, int]

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Json) -> Placement:
        first, last = saved["activation_range"]
        lowest, highest = saved["weight_range"]
        return cls(
            activations={name: tuple(behind) for name, behind in saved["activations"].items()},
            weights=dict(saved["weights"]),
            kept_float=dict(saved["kept_float"]),
            activation_range=(first, last),
            weight_range=(lowest, highest),
        )


def plan_placement(
    graph_module: GraphModule, profile: Profile, exclude: Sequence[str] = ()
) -> Placement:
    """Plan the quantizers that `profile` wants; nodes whose label matches a glob stay in float."""
    activations: dict[str, list[str]] = {}
    weights: dict[str, str] = {}
    kept_float: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        reason = _reason_for_float(node, profile, exclude)
        if reason is not None:
            if family_of(node) in HEAVY:
                kept_float[node.name] = reason
            continue
        wanted = _activations(node)
        if family_of(node) in profile.writes:
            wanted.append(_end_of_clips(node))
        for value in wanted:
            behind = activations.setdefault(_producer(value).name, [_producer(value).name])
            last_move = _without_identities(value).name
            if profile.repeats and last_move not in behind:
                behind.append(last_move)
        if family_of(node) in LAYERS:
            weights[node.name] = _producer(_activations(node)[0]).name
    return Placement(
        activations={producer: tuple(behind) for producer, behind in activations.items()},
        weights=weights,
        kept_float=kept_float,
        activation_range=profile.activation_range,
        weight_range=profile.weight_range,
    )


def insert_quantizers(graph_module: GraphModule, placement: Placement) -> GraphModule:
    """Return the graph with fake quantizers put in, their grids not set; its tensors are shared."""
    graph = copy.deepcopy(graph_module.graph)
    attributes = attributes_of(graph_module)
    nodes = {node.name: node for node in graph.nodes}
    low, high = placement.activation_range
    for producer, behind in placement.activations.items():
        path = _activation_path(producer)
        attributes[path] = FakeQuantizePerTensor(quant_min=low, quant_max=high)
        for node in (nodes[name] for name in behind):
            readers = list(node.users)
            with graph.inserting_after(node):
                quantizer = graph.call_module(path, (node,))
            for reader in readers:
                reader.replace_input_with(node, quantizer)
    low, high = placement.weight_range
    for layer in (nodes[name] for name in placement.weights):
        weight, _ = layer_tensors(layer)
        tensor, path = attributes[str(weight.target)], _weight_path(layer.name)
        assert isinstance(tensor, Tensor)
        attributes[path] = FakeQuantizePerChannel(
            tensor.shape[WEIGHT_AXIS], axis=WEIGHT_AXIS, quant_min=low, quant_max=high
        )
        with graph.inserting_before(layer):
            layer.update_arg(1, graph.call_module(path, (weight,)))
    graph.lint()
    return GraphModule(attributes, graph)


def activation_quantizer(quantized: GraphModule, producer: str) -> FakeQuantizePerTensor:
    """The quantizer of a producer's activation."""
    quantizer = quantized.get_submodule(_activation_path(producer))
    assert isinstance(quantizer, FakeQuantizePerTensor)
    return quantizer


def weight_quantizer(quantized: GraphModule, layer: str) -> FakeQuantizePerChannel:
    """The quantizer of a layer's weight."""
    quantizer = quantized.get_submodule(_weight_path(layer))
    assert isinstance(quantizer, FakeQuantizePerChannel)
    return quantizer


def label_of(node: Node) -> str:
    """What users call a node: a layer's own path, or the path of the module around and a name."""
    if family_of(node) in LAYERS and _is_stored(layer_tensors(node)[0]):
        return str(layer_tensors(node)[0].target).removesuffix(".weight")
    if node.op == "placeholder":
        return "input"
    around = list((node.meta.get("nn_module_stack") or {}).values())
    path = around[-1][0] if around else ""
    return f"{path}.{node.name}" if path else node.name


def _activation_path(producer: str) -> str:
    return f"activation_quantizers.{producer}"


def _weight_path(layer: str) -> str:
    return f"weight_quantizers.{layer}"


def _reason_for_float(node: Node, profile: Profile, exclude: Sequence[str]) -> str | None:
    """Why a node does not read INT8; None where it does."""
    family = family_of(node)
    if family not in profile.reads:
        return f"{family} stays in float on {profile.name}"
    if any(fnmatchcase(label_of(node), pattern) for pattern in exclude):
        return "excluded by the recipe"
    if family in LAYERS:
        is_stored = _is_stored(layer_tensors(node)[0])
        return None if is_stored else "its weight is computed while the network runs"
    operands = node.args[:2]
    if not all(isinstance(operand, Node) and _is_activation(operand) for operand in operands):
        return "an operand does not depend on the input"
    if not any(family_of(_producer(operand)) == "conv" for operand in _activations(node)):
        return "INT8 sums are faster only where convolutions write them"
    return None


def _activations(node: Node) -> list[Node]:
    """The operands of a node that reads INT8 which are activations."""
    operands = node.args[:1] if family_of(node) in LAYERS else node.args[:2]
    return [operand for operand in operands if isinstance(operand, Node)]


def _is_activation(value: Node) -> bool:
    """Whether a value is made of numbers that depend on the network's input."""
    tensor = value.meta.get("val")
    is_numbers = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return is_numbers and not _is_stored(_producer(value))


def _is_stored(value: Node) -> bool:
    return value.op == "get_attr"


def _producer(value: Node) -> Node:
    """The node that computed the numbers that `value` has moved."""
    while family_of(value) in ("move", "identity"):
        value = _first_operand(value)
    return value


def _without_identities(value: Node) -> Node:
    while family_of(value) == "identity":
        value = _first_operand(value)
    return value


def _first_operand(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def _end_of_clips(node: Node) -> Node:
    """The node behind the bounds that alone read this one."""
    while len(node.users) == 1 and family_of(next(iter(node.users))) == "clip":
        node = next(iter(node.users))
    return node
