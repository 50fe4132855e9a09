"""Where fake quantizers stand in a graph: planned by a pure function, then put in.

The plan is data, and it is what a run saves: the same plan on the same graph is the same module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeAlias

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from slimdown.capture.call import arguments_of
from slimdown.core import Json
from slimdown.errors import RecipeError
from slimdown.quantize.fake_quantize import FakeQuantizePerChannel, FakeQuantizePerTensor
from slimdown.quantize.families import HEAVY, LAYERS, family_of
from slimdown.quantize.fold import attributes_of, layer_tensors
from slimdown.quantize.profiles import Profile

WEIGHT_AXIS = 0  # of the output channels, in every layer

SPARED_BELOW = 7
"""With fewer bits of weight than this, the first and the last layer keep 8."""

Range: TypeAlias = tuple[int, int]
"""The lowest and the highest level of a quantizer."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The quantizers of a graph, told by the names of its nodes."""

    activations: dict[str, tuple[str, ...]]
    """Producer -> the nodes behind which its one quantizer stands: itself, and moves of it.

    Of a concatenation in INT8 also the producers of its parts, which share its grid.
    """
    weights: dict[str, str]
    """Layer whose weight is quantized -> the producer on whose grid its input is."""
    kept_float: dict[str, str]
    """Node that does heavy arithmetic in float -> why."""
    activation_ranges: dict[str, Range]
    """Producer -> the levels of its quantizer."""
    weight_ranges: dict[str, Range]
    """Layer -> the levels of its weight."""
    symmetric: bool = False
    """Whether the zero points of activations are 0."""

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Json) -> Placement:
        return cls(
            activations={name: tuple(behind) for name, behind in saved["activations"].items()},
            weights=dict(saved["weights"]),
            kept_float=dict(saved["kept_float"]),
            activation_ranges=_read_ranges(saved["activation_ranges"]),
            weight_ranges=_read_ranges(saved["weight_ranges"]),
            symmetric=saved.get("symmetric", False),
        )


def plan_placement(
    graph_module: GraphModule,
    profile: Profile,
    exclude: Sequence[str] = (),
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    bits_of: Mapping[str, int] = MappingProxyType({}),
) -> Placement:
    """Plan the quantizers that `profile` wants; nodes whose label matches a glob stay in float.

    Weights get `weight_bits`, and what layers read gets `activation_bits`; the first and the last
    layer and their inputs keep 8, as in Esser 2020, arXiv:1902.08153. Of weights that have 7 they
    have 7, too: that many cost little, and are for CPUs whose 16-bit sums saturate in any layer.
    `bits_of` (glob of labels -> bits of the weight, and at least so many for what the layer reads)
    has the last word. What several layers read gets the most bits that one of them wants. Raises
    RecipeError for bits outside of 2 to 8.
    """
    for bits in (weight_bits, activation_bits, *bits_of.values()):
        _check_bits(bits)
    activations, weights, kept_float = _place(graph_module, profile, exclude)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    ends = _first_and_last(graph_module)
    spared = ends if weight_bits < SPARED_BELOW else set()
    chosen = {
        layer: bits
        for glob, bits in bits_of.items()
        for layer in weights
        if fnmatchcase(label_of(nodes[layer]), glob)
    }
    bits_of_input: dict[str, int] = {}
    for layer, producer in weights.items():
        wanted_bits = 8 if layer in ends else max(activation_bits, chosen.get(layer, 0))
        bits_of_input[producer] = max(wanted_bits, bits_of_input.get(producer, 0))
    attributes = attributes_of(graph_module)
    return Placement(
        activations={producer: tuple(behind) for producer, behind in activations.items()},
        weights=weights,
        kept_float=kept_float,
        activation_ranges={
            producer: _narrow(profile.activation_range, bits_of_input.get(producer, 8))
            for producer in activations
        },
        weight_ranges={
            layer: _narrow(
                _range_of_weight(nodes[layer], attributes, profile),
                chosen.get(layer, 8 if layer in spared else weight_bits),
            )
            for layer in weights
        },
        symmetric=profile.symmetric,
    )


def integer_nodes(
    graph_module: GraphModule, profile: Profile, exclude: Sequence[str] = ()
) -> list[Node]:
    """The nodes that read INT8 by that plan: layers and, where the profile wants it, sums."""
    nodes = graph_module.graph.nodes
    return [node for node in nodes if _reason_for_float(node, profile, exclude) is None]


def insert_quantizers(graph_module: GraphModule, placement: Placement) -> GraphModule:
    """Return the graph with fake quantizers put in, their grids not set; its tensors are shared."""
    graph = copy.deepcopy(graph_module.graph)
    attributes = attributes_of(graph_module)
    nodes = {node.name: node for node in graph.nodes}
    for producer, behind in placement.activations.items():
        low, high = placement.activation_ranges[producer]
        path = _activation_path(producer)
        attributes[path] = FakeQuantizePerTensor(quant_min=low, quant_max=high)
        for node in (nodes[name] for name in behind):
            readers = list(node.users)
            with graph.inserting_after(node):
                quantizer = graph.call_module(path, (node,))
            for reader in readers:
                reader.replace_input_with(node, quantizer)
    for layer in (nodes[name] for name in placement.weights):
        weight, _ = layer_tensors(layer)
        low, high = placement.weight_ranges[layer.name]
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


def _place(
    graph_module: GraphModule, profile: Profile, exclude: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, str], dict[str, str]]:
    """Where quantizers stand: `Placement.activations`, `weights` and `kept_float`."""
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
        if profile.fuses_sums and family_of(node) == "add":
            fused = next(filter(_is_written_for_one, wanted), None)
            wanted = [operand for operand in wanted if operand is not fused]
        if family_of(node) in profile.writes:
            wanted.append(_end_of_clips(node))
        for value in wanted:
            behind = activations.setdefault(_producer(value).name, [_producer(value).name])
            last_move = _without_identities(value).name
            if profile.repeats and last_move not in behind:
                behind.append(last_move)
        if family_of(node) in LAYERS:
            weights[node.name] = _producer(_activations(node)[0]).name
    if profile.joins:
        activations, keys = _join(graph_module, activations, repeats=profile.repeats)
        weights = {layer: keys.get(producer, producer) for layer, producer in weights.items()}
    return activations, weights, kept_float


def _join(
    graph_module: GraphModule, activations: Mapping[str, list[str]], *, repeats: bool
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Let concatenations share one quantizer with their parts where all of them have one.

    Returns the quantizers, and for each producer that lost its own the one it has now.
    """
    keys: dict[str, str] = {}
    moved: dict[str, list[str]] = {}

    def key_of(producer: str) -> str:
        while producer in keys:
            producer = keys[producer]
        return producer

    for node in graph_module.graph.nodes:
        members = [node.name, *(_producer(part).name for part in node.all_input_nodes)]
        if family_of(node) != "join" or not all(each in activations for each in members):
            continue
        first = key_of(node.name)
        keys.update({key_of(each): first for each in members if key_of(each) != first})
        if repeats:
            moved[node.name] = [_without_identities(part).name for part in node.all_input_nodes]
    joined: dict[str, list[str]] = {}
    for producer, behind in activations.items():
        together = joined.setdefault(key_of(producer), [])
        both = dict.fromkeys([*behind, *moved.get(producer, ())])
        together.extend(name for name in both if name not in together)
    return joined, {producer: key_of(producer) for producer in keys}


def observed_nodes(graph_module: GraphModule, placement: Placement) -> dict[str, str]:
    """The nodes whose values decide about grids -> the producer whose quantizer it is.

    Of concatenations and their parts the former, which hold all values.
    """
    joins = {node.name for node in graph_module.graph.nodes if family_of(node) == "join"}
    found = {}
    for producer, behind in placement.activations.items():
        names = [name for name in behind if name in joins] or [producer]
        found.update(dict.fromkeys(names, producer))
    return found


def _first_and_last(graph_module: GraphModule) -> set[str]:
    """The layers that no other one stands before, or behind: several where branches begin or end.

    Every layer of the graph counts, also one that stays in float.
    """
    has_before: set[Node] = set()
    reaches: set[Node] = set()
    nodes = list(graph_module.graph.nodes)
    for node in nodes:
        if any(family_of(n) in HEAVY or n in has_before for n in node.all_input_nodes):
            has_before.add(node)
    for node in reversed(nodes):
        if any(family_of(n) in HEAVY or n in reaches for n in node.users):
            reaches.add(node)
    layers = [node for node in nodes if family_of(node) in LAYERS]
    return {node.name for node in layers if node not in has_before or node not in reaches}


def _narrow(levels: Range, bits: int) -> Range:
    """The levels of `bits`, signed or not as `levels` are, and none beyond those."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if levels[0] < 0 else (0, 2**bits - 1)
    return max(low, levels[0]), min(high, levels[1])


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits of a quantizer must be 2 to 8, got {bits}: 4 or 8 are usual")


def _read_ranges(saved: Json) -> dict[str, Range]:
    return {name: (low, high) for name, (low, high) in saved.items()}


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
        if not _is_stored(layer_tensors(node)[0]):
            return "its weight is computed while the network runs"
        if not profile.grouped and _has_wide_groups(node):
            return f"grouped convolutions stay in float on {profile.name}"
        return None
    operands = node.args[:2]
    if not all(isinstance(operand, Node) and _is_activation(operand) for operand in operands):
        return "an operand does not depend on the input"
    if not any(family_of(_producer(operand)) == "conv" for operand in _activations(node)):
        return "INT8 sums are faster only where convolutions write them"
    return None


def _has_wide_groups(layer: Node) -> bool:
    """Whether it is a convolution of several groups that read or write several channels each."""
    groups = arguments_of(layer).get("groups", 1)
    sizes = {value.meta["val"].shape[1] for value in (layer, *_activations(layer))}
    return groups != 1 and sizes != {groups}


def _range_of_weight(
    layer: Node, attributes: Mapping[str, Tensor | nn.Module], profile: Profile
) -> Range:
    """The levels that the profile has for a layer's weight, whatever its bits."""
    weight = attributes[str(layer_tensors(layer)[0].target)]
    assert isinstance(weight, Tensor)
    if profile.winograd_weight_range and _suits_winograd(layer, weight.shape):
        return profile.winograd_weight_range
    return profile.weight_range


def _suits_winograd(layer: Node, shape: Sequence[int]) -> bool:
    """Whether it is a 3x3 convolution without steps or groups; `shape` is that of its weight."""
    given = arguments_of(layer)
    steps = (given.get("groups"), *given.get("stride", ()), *given.get("dilation", ()))
    return set(steps) == {1} and tuple(shape[2:]) == (3, 3)


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


def _is_written_for_one(value: Node) -> bool:
    """Whether a convolution writes a value that nothing but its one reader sees."""
    while family_of(value) == "identity" and len(value.users) == 1:
        value = _first_operand(value)
    return family_of(value) == "conv" and len(value.users) == 1


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
