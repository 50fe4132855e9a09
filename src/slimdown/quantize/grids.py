"""The scales and zero points of a quantized graph: set from statistics, and told to the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from slimdown.core import Json
from slimdown.quantize.calibrate import (
    CALIBRATIONS,
    Calibration,
    fit_grid,
    least_scale,
    num_levels_of,
    weight_scales,
)
from slimdown.quantize.fake_quantize import FakeQuantizePerChannel, FakeQuantizePerTensor
from slimdown.quantize.families import LAYERS, family_of
from slimdown.quantize.fold import attributes_of, layer_tensors
from slimdown.quantize.observe import RangeStatistics
from slimdown.quantize.placement import Placement, activation_quantizer, weight_quantizer


@torch.no_grad()
def set_activation_grids_(
    quantized: GraphModule,
    placement: Placement,
    seen: Mapping[str, RangeStatistics],
    calibration: Calibration,
) -> None:
    """Give each activation the range that `calibration` chooses from what was seen of it."""
    symmetric = placement.symmetric
    for producer in placement.activations:
        quant_min, quant_max = placement.activation_ranges[producer]
        num_levels = num_levels_of(quant_min, quant_max, symmetric=symmetric)
        low, high = CALIBRATIONS[calibration](seen[producer], num_levels, symmetric=symmetric)
        grid = fit_grid(low, high, quant_min, quant_max, symmetric=symmetric)
        quantizer = activation_quantizer(quantized, producer)
        quantizer.scale.fill_(grid.scale)
        quantizer.zero_point.fill_(grid.zero_point)


@torch.no_grad()
def set_weight_grids_(quantized: GraphModule, placement: Placement) -> None:
    """Give each channel of a weight its scale; the grids of activations are set already."""
    for layer, (weight, bias) in _weights(quantized, placement).items():
        input_scale = float(activation_quantizer(quantized, placement.weights[layer]).scale)
        levels = placement.weight_ranges[layer]
        scales = weight_scales(weight, *levels, bias=bias, input_scale=input_scale)
        weight_quantizer(quantized, layer).scale.copy_(scales)


@torch.no_grad()
def round_biases_(quantized: GraphModule) -> None:
    """Put biases on the int32 grid, input scale times weight scale, on which a runtime keeps them.

    Without it the torch module's outputs lie 36 dB from ONNX Runtime's on a ResNet-20, with it 46.
    A weight scale too small for its channel's bias in int32 is raised first: such a bias, moved by
    training, dwarfs its weights.
    """
    attributes = attributes_of(quantized)
    for layer in quantized.graph.nodes:
        if family_of(layer) not in LAYERS:
            continue
        weight_node, bias_node = layer_tensors(layer)
        weights = attributes.get(str(weight_node.target))
        if bias_node is None or not isinstance(weights, FakeQuantizePerChannel):
            continue
        bias, input_scale = attributes[str(bias_node.target)], _input_scale(layer, attributes)
        assert isinstance(bias, Tensor)
        weights.scale.copy_(weights.scale.maximum(least_scale(bias, input_scale)))
        step = input_scale * weights.scale
        bias.copy_((bias / step).round() * step)


def _input_scale(layer: Node, attributes: Mapping[str, object]) -> Tensor:
    """The scale, (), of the grid on which a layer reads its input, found behind moves of values."""
    node = layer.args[0]
    while True:
        assert isinstance(node, Node)
        quantizer = attributes.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, FakeQuantizePerTensor):
            return quantizer.scale
        assert family_of(node) in ("move", "identity"), node
        node = node.args[0]


def describe_ranges(
    quantized: GraphModule,
    placement: Placement,
    seen: Mapping[str, RangeStatistics],
    labels: Mapping[str, str],
) -> list[Json]:
    """What was seen of each tensor, and what its grid can represent."""
    activations = [
        _describe(
            labels[producer],
            "activation",
            (seen[producer].low, seen[producer].high),
            activation_quantizer(quantized, producer),
        )
        for producer in placement.activations
    ]
    weights = [
        _describe(
            labels[layer],
            "weight",
            (float(weight.min()), float(weight.max())),
            weight_quantizer(quantized, layer),
        )
        for layer, (weight, _) in _weights(quantized, placement).items()
    ]
    return activations + weights


CRUSHED = 0.9
"""Of the values other than zero: from so many that a grid makes zero, the user is told."""


def find_crushed(
    quantized: GraphModule,
    placement: Placement,
    seen: Mapping[str, RangeStatistics],
    labels: Mapping[str, str],
) -> list[str]:
    """A remark on each activation of which a few far values leave next to nothing.

    They are kept all the same: where they are no mistake, they often decide about the output (Sun
    2024, arXiv:2402.17762), which the squared error alone cannot tell.
    """
    notes = []
    for producer in placement.activations:
        scale = float(activation_quantizer(quantized, producer).scale)
        values, counts = seen[producer].histogram()
        is_zero, others = values.abs() < scale / 2, counts * (values != 0)
        share = float(others[is_zero].sum() / others.sum().clamp(min=1))
        if share >= CRUSHED:
            largest = max(-seen[producer].low, seen[producer].high)
            notes.append(
                f"{labels[producer]}: {100 * share:.0f} % of its values become zero in INT8, since "
                f"others reach {largest:.3g}: look at the images and at the weights before it, or "
                "take another quantize.calibration, such as percentile, or exclude what reads it"
            )
    return notes


def _describe(
    label: str,
    kind: Literal["activation", "weight"],
    seen: tuple[float, float],
    quantizer: FakeQuantizePerTensor | FakeQuantizePerChannel,
) -> Json:
    lowest = (quantizer.quant_min - quantizer.zero_point) * quantizer.scale
    highest = (quantizer.quant_max - quantizer.zero_point) * quantizer.scale
    return {
        "layer": label,
        "kind": kind,
        "low": seen[0],
        "high": seen[1],
        "clipped_low": float(lowest.min()),
        "clipped_high": float(highest.max()),
    }


def _weights(
    quantized: GraphModule, placement: Placement
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The float weight and bias of each layer whose weight is quantized."""
    attributes = attributes_of(quantized)
    nodes = {node.name: node for node in quantized.graph.nodes}
    found = {}
    for layer in placement.weights:
        quantizer, bias_node = layer_tensors(nodes[layer])
        (weight_node,) = quantizer.all_input_nodes
        weight = attributes[str(weight_node.target)]
        bias = None if bias_node is None else attributes[str(bias_node.target)]
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        found[layer] = (weight.detach(), None if bias is None else bias.detach())
    return found
