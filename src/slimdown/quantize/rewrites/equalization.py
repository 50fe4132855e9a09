"""Rungs that even out channels: of layers (equalization), and of norms (smoothing)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from slimdown.quantize.calibrate import num_levels_of
from slimdown.quantize.fold import attributes_of
from slimdown.quantize.placement import Placement
from slimdown.quantize.rewrites.balance import Reading, balance
from slimdown.quantize.rewrites.channels import Channels, find_channels
from slimdown.quantize.rewrites.makers import (
    channel_axis,
    factors_of,
    is_norm,
    rows_of,
    tensors_of,
)


def equalize(
    graph_module: GraphModule, images: Sequence[Tensor], placement: Placement
) -> GraphModule:
    """Even out channels that layers make; `images` are (N, C, H, W) each.

    Cross-layer equalization (Nagel 2019, arXiv:1906.04721), across depthwise layers, shortcuts,
    concatenations and the values of attention, too. Returns the same function.
    """
    return _rebalance(graph_module, images, placement, of_norms=False)


def smooth(
    graph_module: GraphModule, images: Sequence[Tensor], placement: Placement
) -> GraphModule:
    """Even out channels that norms make, and center them; `images` are (N, C, H, W) each.

    SmoothQuant (Xiao 2023, arXiv:2211.10438) and the reparametrization of RepQ-ViT (Li 2023,
    arXiv:2212.08254). Returns the same function.
    """
    return _rebalance(graph_module, images, placement, of_norms=True)


def _rebalance(
    graph_module: GraphModule, images: Sequence[Tensor], placement: Placement, *, of_norms: bool
) -> GraphModule:
    channels = find_channels(graph_module, images[0][:1])
    nodes = {node.name: node for node in graph_module.graph.nodes}
    made_by_norms = torch.zeros(channels.count, dtype=torch.bool)
    for name, numbers in channels.made.items():
        if is_norm(nodes[name]):
            made_by_norms[numbers] = True
    can_scale = made_by_norms if of_norms else ~made_by_norms
    can_scale[0] = False
    if not bool(can_scale.any()):
        return graph_module
    layers = [
        name
        for name, numbers in channels.read.items()
        if name in placement.weights and bool(can_scale[numbers].any())
    ]
    readings = _read(graph_module, images, placement, channels, layers)
    factors, shifts = balance(readings, can_scale, channels.can_shift)
    return scale_channels(graph_module, channels, factors, shifts)


@dataclass
class _Seen:
    """What a layer has read so far, channel by channel, (C_in,) float64 each."""

    low: Tensor
    high: Tensor
    total: Tensor
    squares: Tensor
    count: int

    def add(self, rows: Tensor) -> None:
        """Count values, (M, C_in)."""
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.total += rows.sum(0, dtype=torch.float64)
        self.squares += rows.square().sum(0, dtype=torch.float64)
        self.count += len(rows)


class _Watch(Interpreter):
    """Runs the graph, and counts what some layers read."""

    def __init__(self, graph_module: GraphModule, layers: Sequence[str]) -> None:
        super().__init__(graph_module)
        self.layers = frozenset(layers)
        self.seen: dict[str, _Seen] = {}

    def run_node(self, n: Node) -> Any:
        if n.name in self.layers:
            axis = channel_axis(n)
            assert axis is not None
            rows = self.env[n.all_input_nodes[0]].movedim(axis, -1).flatten(0, -2)
            if n.name not in self.seen:
                zeros = rows.new_zeros(rows.shape[1], dtype=torch.float64)
                self.seen[n.name] = _Seen(rows.amin(0), rows.amax(0), zeros, zeros.clone(), 0)
            self.seen[n.name].add(rows)
        return super().run_node(n)


@torch.no_grad()
def _read(
    graph_module: GraphModule,
    images: Sequence[Tensor],
    placement: Placement,
    channels: Channels,
    layers: Sequence[str],
) -> list[Reading]:
    watch = _Watch(graph_module, layers)
    for batch in images:
        watch.run(batch.clone())
    nodes = {node.name: node for node in graph_module.graph.nodes}
    attributes = attributes_of(graph_module)
    readings = []
    for name in layers:
        weight_node, _ = tensors_of(nodes[name])
        assert weight_node is not None
        weight = attributes[str(weight_node.target)]
        assert isinstance(weight, Tensor)
        seen = watch.seen[name]
        input_levels = placement.activation_ranges[placement.weights[name]]
        weight_levels = placement.weight_ranges[name]
        rows = weight.detach().double().unsqueeze(-1).flatten(2)
        readings.append(
            Reading(
                channels=channels.read[name],
                low=seen.low.double(),
                high=seen.high.double(),
                mean=seen.total / seen.count,
                square=seen.squares / seen.count,
                peaks=rows.abs().amax(2),
                squares=rows.square().sum(2),
                kernel_size=rows.shape[2],
                num_input_levels=num_levels_of(*input_levels, symmetric=placement.symmetric),
                num_weight_levels=weight_levels[1] - weight_levels[0] + 1,
                symmetric=placement.symmetric,
            )
        )
    return readings


@torch.no_grad()
def scale_channels(
    graph_module: GraphModule, channels: Channels, factors: Tensor, shifts: Tensor
) -> GraphModule:
    """The graph with each channel made factor * (x + shift), and read accordingly.

    `factors`, positive, and `shifts`, 0 but where `channels.can_shift`, are (count,) float64.
    """
    attributes = attributes_of(graph_module)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    changed: dict[str, Tensor] = {}

    def path_of(node: Node | None) -> str:
        assert node is not None
        return str(node.target)

    def get(node: Node | None) -> Tensor | None:
        if node is None:
            return None
        tensor = changed.get(path_of(node), attributes[path_of(node)])
        assert isinstance(tensor, Tensor)
        return tensor.detach().double()

    for name, numbers in channels.read.items():
        layer = nodes[name]
        weight_node, bias_node = tensors_of(layer)
        weight, bias = get(weight_node), get(bias_node)
        assert weight is not None
        if bool(shifts[numbers].any()):  # of linear layers with a bias only
            assert bias is not None
            changed[path_of(bias_node)] = bias - weight @ shifts[numbers]
        changed[path_of(weight_node)] = weight / factors_of(factors[numbers], layer, weight)
    for name, numbers in channels.made.items():
        maker = nodes[name]
        weight_node, bias_node = tensors_of(maker)
        weight, bias = get(weight_node), get(bias_node)
        assert weight is not None
        changed[path_of(weight_node)] = weight * rows_of(factors[numbers], maker, weight)
        if bias is not None:
            changed[path_of(bias_node)] = factors[numbers] * (bias + shifts[numbers])
    for path, tensor in changed.items():
        before = attributes[path]
        assert isinstance(before, Tensor)
        attributes[path] = nn.Parameter(tensor.to(before.dtype))
    return GraphModule(attributes, copy.deepcopy(graph_module.graph))
