"""Narrow INT8 convolutions, padded with channels of zeros to the width that a runtime is fast at.

ONNX Runtime takes twice as long to write 8 or 12 channels as to write 16 (it scales its results 16
at a time and the rest in small steps), and pruning leaves such layers. The outputs stay the same:
what the new channels hold is read by weights of zero, or cut off.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from slimdown.targets.onnx_passes import (
    attribute,
    drop_unused_initializers_,
    initializers,
    producers,
)

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

CHANNELWISE = frozenset({"Relu", "Clip", "MaxPool"})
"""Operators that keep channels apart, so that a padded input gives a padded output."""


@dataclass
class _Group:
    """Values that have their channels in common, and who writes and reads them."""

    num_channels: int
    writers: list[NodeProto] = field(default_factory=list)
    readers: list[NodeProto] = field(default_factory=list)
    cuts: list[tuple[NodeProto, int]] = field(default_factory=list)
    """Inputs that need the true width: a node, and which of its inputs."""
    is_output: bool = False


def widen_narrow_convs_(model: ModelProto, *, width: int) -> None:
    """Pad the INT8 convolutions that write fewer than `width` channels.

    Those whose results are added are padded together. Where that takes as many cuts as there are
    convolutions, they stay narrow.
    """
    graph = model.graph
    for group in _find_groups(graph, width):
        if group.is_output or len(group.cuts) >= len(group.writers):
            continue
        missing = width - group.num_channels
        for conv in group.writers:
            _pad_layer_(graph, conv, missing)
        for conv in group.readers:
            _pad_(graph, producers(graph)[conv.input[1]], 0, axis=1, missing=missing)
        for node, index in group.cuts:
            _cut_(graph, node, index, group.num_channels)
    drop_unused_initializers_(model)


def _find_groups(graph: GraphProto, width: int) -> list[_Group]:
    """Follow the results of narrow convolutions to those who read them."""
    widths = _int8_convs(graph)
    group_of: dict[str, _Group] = {}
    for node in graph.node:
        groups = [group_of[name] for name in node.input if name in group_of]
        (result, *_) = node.output
        if result in widths:
            for group in groups:
                group.readers.append(node)
            if widths[result] < width:
                group_of[result] = _Group(widths[result], writers=[node])
        elif groups and _keeps_channels_apart(graph, node):
            group_of[result] = groups[0]
        elif node.op_type == "Add" and _are_alike(groups):
            group_of[result] = _merge_(group_of, *groups)
        else:
            for index, name in enumerate(node.input):
                if name in group_of:
                    group_of[name].cuts.append((node, index))
    for output in graph.output:
        if output.name in group_of:
            group_of[output.name].is_output = True
    return list({id(group): group for group in group_of.values()}.values())


def _int8_convs(graph: GraphProto) -> dict[str, int]:
    """The results of ungrouped convolutions that have an INT8 weight of their own: channels."""
    constants, writers = initializers(graph), producers(graph)
    num_readers = Counter(name for node in graph.node for name in node.input)
    found = {}
    for node in graph.node:
        if node.op_type != "Conv" or attribute(node, "group", 1) != 1:
            continue
        weight = writers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear" or num_readers[node.input[1]] > 1:
            continue
        if weight.input[0] in constants:
            found[node.output[0]] = int(constants[weight.input[0]].dims[0])
    return found


def _keeps_channels_apart(graph: GraphProto, node: NodeProto) -> bool:
    constants = initializers(graph)
    if node.op_type == "Slice":
        axes = _constant(graph, node, 3)
        return axes is not None and min(axes.tolist()) >= 2
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return node.input[1] in constants and not constants[node.input[1]].dims
    return node.op_type in CHANNELWISE


def _are_alike(groups: list[_Group]) -> bool:
    return len(groups) == 2 and groups[0].num_channels == groups[1].num_channels


def _merge_(group_of: dict[str, _Group], first: _Group, second: _Group) -> _Group:
    if first is not second:
        first.writers += second.writers
        first.readers += second.readers
        first.cuts += second.cuts
        group_of.update({name: first for name, group in group_of.items() if group is second})
    return first


def _pad_layer_(graph: GraphProto, conv: NodeProto, missing: int) -> None:
    """Let a convolution write `missing` channels more, of zeros."""
    writers = producers(graph)
    tensors = [(writers[conv.input[1]], 0)]
    if len(conv.input) > 2:
        bias = writers.get(conv.input[2])
        tensors.append((conv, 2) if bias is None else (bias, 0))
    for node, index in tensors:
        _pad_(graph, node, index, axis=0, missing=missing)
        if node.op_type == "DequantizeLinear":
            # The last channel's grid again: the scales of weight and bias keep their ratio, without
            # which the runtime would not take the layer for an INT8 one.
            for index_of_grid in range(1, len(node.input)):
                _pad_(graph, node, index_of_grid, axis=0, missing=missing, mode="edge")


def _pad_(
    graph: GraphProto,
    node: NodeProto,
    index: int,
    *,
    axis: int,
    missing: int,
    mode: Literal["constant", "edge"] = "constant",
) -> None:
    """Let a node read a constant that is longer by `missing` along `axis`."""
    from onnx import numpy_helper

    array = _constant(graph, node, index)
    assert array is not None
    widths = [(0, missing if dim == axis else 0) for dim in range(array.ndim)]
    padded = np.pad(array, widths, mode=mode)
    name = f"{node.input[index]}_{'x'.join(map(str, padded.shape))}"
    if name not in initializers(graph):  # zero points are shared
        graph.initializer.append(numpy_helper.from_array(padded, name))
    node.input[index] = name


def _cut_(graph: GraphProto, node: NodeProto, index: int, num_channels: int) -> None:
    """Let a node read only the first `num_channels` channels of an input."""
    from onnx import helper, numpy_helper

    bounds = {"start": 0, "end": num_channels, "axis": 1}
    names = {what: f"{node.output[0]}_cut{index}_{what}" for what in bounds}
    for what, name in names.items():
        array = np.array([bounds[what]], np.int64)
        graph.initializer.append(numpy_helper.from_array(array, name))
    result = f"{node.output[0]}_cut{index}"
    cut = helper.make_node(
        "Slice", [node.input[index], *names.values()], [result], name=f"node_{result}"
    )
    graph.node.insert(list(graph.node).index(node), cut)
    node.input[index] = result


def _constant(graph: GraphProto, node: NodeProto, index: int) -> npt.NDArray[np.generic] | None:
    """An input of a node, where it is a constant."""
    from onnx import numpy_helper

    if len(node.input) <= index:
        return None
    found = initializers(graph).get(node.input[index])
    return None if found is None else numpy_helper.to_array(found)
